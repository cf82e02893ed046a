#include "domain.hpp"

#include <algorithm>
#include <array>

namespace nb = nanobind;

namespace isthmus {
namespace {

constexpr std::uint64_t gil_spin_ns = 5'000;  // an answer in this time is not worth two switches of the GIL
constexpr std::uint64_t signal_check_ns = 5'000'000;  // how long a spinning thread may ignore a signal
constexpr std::uint64_t tick_ns = 500'000'000;
constexpr int frame_fields = 9;

std::uint64_t later(std::uint64_t start_ns, double duration_s) {
    if (!(duration_s > 0)) return start_ns;
    return duration_s > 1e9 ? forever_ns : start_ns + static_cast<std::uint64_t>(duration_s * 1e9);
}

}  // namespace

// From when on, until when without sleep, until when at all.
struct Domain::Times {
    Times(double timeout_s, double spin_s)
        : start_ns(now_ns()),
          spin_until_ns(later(start_ns, std::min(spin_s, timeout_s))),
          until_ns(later(start_ns, timeout_s)) {}
    std::uint64_t start_ns, spin_until_ns, until_ns;
};

// The right to drive; not taken when this very thread has it already (a signal handler inside `attend`).
class Domain::Turn {
 public:
    explicit Turn(Domain& domain) : domain_(domain) {
        const unsigned long self = PyThread_get_thread_ident();
        if (domain.driver_.load(std::memory_order_relaxed) == self) return;
        if (!domain.turns_.try_take()) wait();
        domain.driver_.store(self, std::memory_order_relaxed);
        taken_ = true;
    }
    ~Turn() {
        if (taken_) pass_on();
    }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;
    bool taken() const { return taken_; }
    // Let those go first who wait.
    void yield() {
        pass_on();
        wait();
        domain_.driver_.store(PyThread_get_thread_ident(), std::memory_order_relaxed);
    }

 private:
    void wait() {
        const nanobind::gil_scoped_release release;
        domain_.engine.turns_wanted.fetch_add(1);
        domain_.engine.interrupt();
        domain_.turns_.take();
        domain_.engine.turns_wanted.fetch_sub(1);
    }
    void pass_on() {
        domain_.driver_.store(0, std::memory_order_relaxed);
        domain_.turns_.release();
    }
    Domain& domain_;
    bool taken_ = false;
};

Domain::Domain(const UcxLibrary& library, nb::type_object frame_type, nb::object lost_error,
               nb::object fabric_error)
    : engine(library),
      frame_type_(frame_type.release().ptr()),
      lost_error_(lost_error.release().ptr()),
      fabric_error_(fabric_error.release().ptr()) {}

Domain::~Domain() {
    if (engine.usable()) engine.close();
    release_views();
    for (PyObject* frame : side_) Py_DECREF(frame);
    Py_DECREF(frame_type_);
    Py_DECREF(lost_error_);
    Py_DECREF(fabric_error_);
}

nb::object Domain::to_frame(Message& message) const {
    const FrameHeader& header = message.header;
    auto* type = reinterpret_cast<PyTypeObject*>(frame_type_);
    nb::object frame = nb::steal(type->tp_alloc(type, frame_fields));
    if (!frame.is_valid()) throw nb::python_error();
    const Bytes meta = message.meta();
    const std::array<PyObject*, frame_fields> fields{
        PyLong_FromUnsignedLong(header.channel_id),
        PyLong_FromLong(static_cast<long>(header.kind)),
        PyLong_FromUnsignedLongLong(header.call_id),
        PyLong_FromUnsignedLong(header.function_id),
        PyLong_FromLong(header.flags),
        PyLong_FromUnsignedLongLong(header.deadline_ns),
        PyLong_FromUnsignedLong(header.credits),
        PyBytes_FromStringAndSize(reinterpret_cast<const char*>(meta.data()),
                                  static_cast<Py_ssize_t>(meta.size())),
        message.data ? to_memoryview(std::move(message.data)).release().ptr() : Py_NewRef(Py_None),
    };
    for (Py_ssize_t index = 0; index < frame_fields; ++index)
        PyTuple_SET_ITEM(frame.ptr(), index, fields[static_cast<std::size_t>(index)]);
    if (std::ranges::find(fields, nullptr) != fields.end()) throw nb::python_error();
    return frame;
}

nb::object Domain::take_side() {
    if (side_.empty()) return nb::none();
    PyObject* frame = side_.front();
    side_.pop_front();
    return nb::steal(frame);
}

// The inbox's first frame that is for Python, or None.
nb::object Domain::take_frame() {
    Message message;
    while (engine.take(message)) {
        if (message.header.kind == Kind::call && engine.has_functions()) {
            const nb::gil_scoped_release release;
            if (engine.answer_late(message)) continue;
        }
        return to_frame(message);
    }
    return nb::none();
}

void Domain::attend(nb::handle self) {
    for (const NativeFailure& failure : engine.take_native_failures())
        self.attr("_native_failed")(failure.channel_id, failure.call_id, failure.function_id, failure.code);
    for (const Ready& ready : engine.take_ready()) self.attr("_attend")(ready.descriptor, ready.events);
}

// Handshakes have deadlines that no descriptor reports.
void Domain::tick(nb::handle self, std::uint64_t time_ns) {
    if (time_ns - ticked_ns_ < tick_ns) return;
    ticked_ns_ = time_ns;
    self.attr("_attend")(-1, 0);
}

// Without the GIL: spin, then sleep, but not past the next look for signals.
Outcome Domain::wait(std::uint64_t time_ns, std::uint64_t spin_until_ns, std::uint64_t until_ns) {
    const nb::gil_scoped_release release;
    if (time_ns >= spin_until_ns) return engine.sleep(until_ns);
    const std::uint64_t pause_ns = std::min({spin_until_ns, until_ns, time_ns + signal_check_ns});
    const Outcome outcome = engine.spin(time_ns, pause_ns);
    return outcome == Outcome::nothing ? Outcome::interrupted : outcome;
}

Outcome Domain::drive(nb::handle self, Turn& turn, bool may_yield, Times times) {
    auto [time_ns, spin_until_ns, until_ns] = times;
    const std::uint64_t spin_ns = spin_until_ns - std::min(spin_until_ns, time_ns);
    std::uint64_t native_calls = engine.counters.native_calls.load(std::memory_order_relaxed);
    for (;; time_ns = now_ns()) {
        if (const std::uint64_t served = engine.counters.native_calls.load(std::memory_order_relaxed);
            served != native_calls) {
            native_calls = served;
            spin_until_ns = std::min(time_ns + spin_ns, until_ns);  // whoever called may call again at once
        }
        if (ticks_wanted_) tick(self, time_ns);
        Outcome outcome = Outcome::nothing;
        if (engine.has_functions()) {
            const nb::gil_scoped_release release;
            outcome = engine.glance(time_ns);
        } else {
            outcome = engine.glance(time_ns);
            const std::uint64_t brief_until_ns = std::min({spin_until_ns, until_ns, time_ns + gil_spin_ns});
            if (outcome == Outcome::nothing && time_ns < brief_until_ns) {
                outcome = engine.spin(time_ns, brief_until_ns);
                time_ns = brief_until_ns;
            }
        }
        if (outcome == Outcome::nothing) {
            if (time_ns < until_ns) {
                outcome = wait(time_ns, spin_until_ns, until_ns);
            } else if (outcome = engine.last_look(); outcome == Outcome::nothing) {
                return outcome;
            }
        }
        switch (outcome) {
            case Outcome::attention:
                attend(self);
                if (may_yield && !side_.empty()) return Outcome::nothing;
                break;
            case Outcome::interrupted:
                check_signals();
                break;
            case Outcome::woken:
                if (engine.take_wake()) return outcome;
                if (may_yield && engine.turns_wanted.load() != 0) turn.yield();
                break;
            case Outcome::nothing:
                break;
            default:
                return outcome;
        }
        release_views();
    }
}

nb::object Domain::poll(nb::handle self, double timeout_s, double spin_s) {
    require_usable();
    Turn turn(*this);
    if (!side_.empty()) return take_side();
    if (!turn.taken()) return take_frame();
    for (Times times(timeout_s, spin_s);; times.start_ns = now_ns()) {
        const Outcome outcome = drive(self, turn, true, times);
        release_views();
        if (!side_.empty()) return take_side();
        if (outcome != Outcome::message) return nb::none();
        if (nb::object frame = take_frame(); !frame.is_none()) return frame;
    }
}

bool Domain::send(Channel& channel, Envelope& envelope) {
    SendStatus status{};
    if (envelope.is_large()) {
        const nb::gil_scoped_release release;
        status = engine.send(channel, envelope.outgoing);
    } else {
        status = engine.send(channel, envelope.outgoing);
    }
    if (status == SendStatus::sent) envelope.sent();
    release_views();
    if (status == SendStatus::lost) fail_lost("the peer is gone");
    return status == SendStatus::sent;
}

nb::object Domain::call(nb::handle self, Channel& channel, Envelope& envelope, double spin_s,
                        double timeout_s) {
    require_usable();
    Turn turn(*this);
    if (!turn.taken()) fail_fabric("call() from inside poll() or call() of the same thread");
    Times times(timeout_s, spin_s);
    envelope.outgoing.awaits = true;
    struct Stop {
        Engine& engine;
        ~Stop() { engine.stop_awaiting(); }
    } const stop{engine};
    while (!send(channel, envelope)) {
        times.start_ns = now_ns();
        if (times.start_ns >= times.until_ns) return nb::none();
        const nb::gil_scoped_release release;
        engine.spin(times.start_ns, times.start_ns + gil_spin_ns);
    }
    const Outcome outcome = drive(self, turn, false, times);
    release_views();
    if (outcome == Outcome::answer) return to_frame(engine.answer());
    if (outcome == Outcome::lost) fail_lost(channel.closed ? "the channel is closed" : "the peer is gone");
    return nb::none();
}

void Domain::close() {
    if (!engine.usable() || engine.is_closed()) return;
    Turn turn(*this);
    {
        const nb::gil_scoped_release release;
        engine.close();
    }
    release_views();
}

}  // namespace isthmus
