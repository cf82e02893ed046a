// module.cpp: the engine as Python sees it. Converts, drops the GIL and calls; what it decides is only when
// to drop it. Invariant: the GIL is never taken while the engine's lock is held. `Engine` and `Link` are the
// bases of UcxDomain and UcxChannel (fabric/ucx.py), so that poll, send and call are single native calls.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <optional>

#include "engine.hpp"
#include "turns.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using isthmus::Bytes;
using isthmus::Channel;
using isthmus::FrameHeader;
using isthmus::Kind;
using isthmus::Message;
using isthmus::now_ns;
using isthmus::Outcome;
using isthmus::Outgoing;
using isthmus::SendStatus;

constexpr std::uint64_t gil_spin_ns = 5'000;  // an answer in this time is not worth two switches of the GIL
constexpr std::uint64_t signal_check_ns = 5'000'000;  // how long a spinning thread may ignore a signal
constexpr std::uint64_t tick_ns = 500'000'000;
constexpr Py_ssize_t meta_copied_bytes =
    isthmus::Sending::meta_inline_bytes / 2;  // always travels in the header
constexpr std::size_t large_bytes = std::size_t{1} << 20;
constexpr int frame_fields = 9;

std::uint64_t later(std::uint64_t start_ns, double duration_s) {
    if (!(duration_s > 0)) return start_ns;
    return duration_s > 1e9 ? isthmus::forever_ns : start_ns + static_cast<std::uint64_t>(duration_s * 1e9);
}

// data
// ------------------------------------------------------------------------------------------------------------
// Received data as a writable Python buffer; the pool gets it back when the last view is gone.
struct Data {
    isthmus::Buffer buffer;
};

int data_get_buffer(PyObject* self, Py_buffer* view, int flags) {
    const isthmus::Buffer& buffer = nb::inst_ptr<Data>(self)->buffer;
    return PyBuffer_FillInfo(view, self, buffer.data(), static_cast<Py_ssize_t>(buffer.size()), 0, flags);
}

PyType_Slot data_slots[] = {{Py_bf_getbuffer, reinterpret_cast<void*>(data_get_buffer)}, {0, nullptr}};

nb::object to_memoryview(isthmus::Buffer&& buffer) {
    nb::object data = nb::cast(Data{std::move(buffer)}, nb::rv_policy::move);
    PyObject* view = PyMemoryView_FromObject(data.ptr());
    if (view == nullptr) throw nb::python_error();
    return nb::steal(view);
}

// The Python buffers of one send, held until UCX is done with them.
struct Views {
    std::vector<Py_buffer> buffers;
    std::vector<Bytes> spans;

    Views() = default;
    Views(const Views&) = delete;
    Views& operator=(const Views&) = delete;
    ~Views() {
        for (Py_buffer& buffer : buffers) PyBuffer_Release(&buffer);
    }
    Bytes add(PyObject* object) {
        Py_buffer buffer;
        if (PyObject_GetBuffer(object, &buffer, PyBUF_SIMPLE) != 0) throw nb::python_error();
        buffers.push_back(buffer);
        return {static_cast<const std::byte*>(buffer.buf), static_cast<std::size_t>(buffer.len)};
    }
};

// The arguments of a send, as the engine wants them.
class Envelope {
 public:
    Envelope(nb::handle meta, nb::handle data) {
        set_meta(meta.ptr());
        if (!data.is_none()) set_data(data.ptr());
        outgoing.owner = views_.get();
    }
    // The engine has taken the owner over.
    void sent() { static_cast<void>(views_.release()); }

    // Is copying the data worth letting other threads run?
    bool is_large() const {
        std::size_t total = 0;
        for (const Bytes piece : outgoing.data) total += piece.size();
        return total > large_bytes;
    }

    Outgoing outgoing{};

 private:
    Views& views() {
        if (!views_) views_ = std::make_unique<Views>();
        return *views_;
    }
    void set_meta(PyObject* meta) {
        if (PyBytes_CheckExact(meta) && PyBytes_GET_SIZE(meta) <= meta_copied_bytes) {
            outgoing.meta = {reinterpret_cast<const std::byte*>(PyBytes_AS_STRING(meta)),
                             static_cast<std::size_t>(PyBytes_GET_SIZE(meta))};
        } else {  // may be read after the call, so it must be immutable
            const nb::object bytes = nb::steal(PyBytes_FromObject(meta));
            if (!bytes.is_valid()) throw nb::python_error();
            outgoing.meta = views().add(bytes.ptr());
        }
    }
    void set_data(PyObject* data) {
        if (PyTuple_CheckExact(data) && PyTuple_GET_SIZE(data) == 0) return;
        const nb::object items = nb::steal(PySequence_Fast(data, "data must be a sequence of buffers"));
        if (!items.is_valid()) throw nb::python_error();
        const Py_ssize_t count = PySequence_Fast_GET_SIZE(items.ptr());
        for (Py_ssize_t index = 0; index < count; ++index) {
            const Bytes bytes = views().add(PySequence_Fast_GET_ITEM(items.ptr(), index));
            if (!bytes.empty()) views().spans.push_back(bytes);
        }
        if (views_) outgoing.data = views_->spans;
    }

    std::unique_ptr<Views> views_;
};

// Domain
// ----------------------------------------------------------------------------------------------------------
std::optional<isthmus::UcxLibrary>& library() {
    static auto* loaded = new std::optional<isthmus::UcxLibrary>;  // outlives every engine
    return *loaded;
}

std::pair<std::string, std::string> load(const std::string& path) {
    if (!library()) library() = isthmus::UcxLibrary::load(path);
    return {library()->path, library()->version};
}

const isthmus::UcxLibrary& loaded_library() {
    if (!library()) throw std::runtime_error("load() a UCX library first");
    return *library();
}

class Domain {
 public:
    Domain(nb::type_object frame_type, nb::object lost_error, nb::object fabric_error)
        : engine(loaded_library()),
          frame_type_(frame_type.release().ptr()),
          lost_error_(lost_error.release().ptr()),
          fabric_error_(fabric_error.release().ptr()) {}
    ~Domain() {
        if (engine.usable()) engine.close();
        release_views();
        for (PyObject* frame : side_) Py_DECREF(frame);
        Py_DECREF(frame_type_);
        Py_DECREF(lost_error_);
        Py_DECREF(fabric_error_);
    }
    Domain(const Domain&) = delete;
    Domain& operator=(const Domain&) = delete;

    void require_usable() const {
        if (!engine.usable())
            fail(fabric_error_, "this domain belongs to the parent process; open a new one after a fork");
        if (engine.is_closed()) fail(fabric_error_, "the domain is closed");
    }
    [[noreturn]] void fail_lost(const char* why) const { fail(lost_error_, why); }
    [[noreturn]] void fail_fabric(const char* why) const { fail(fabric_error_, why); }

    nb::object poll(nb::handle self, double timeout_s, double spin_s);
    nb::object call(nb::handle self, Channel& channel, Envelope& envelope, double spin_s, double timeout_s);
    bool send(Channel& channel, Envelope& envelope);
    void close();

    // A frame that did not come by UCX; the next poll returns it.
    void push(nb::object frame) {
        side_.push_back(frame.release().ptr());
        engine.interrupt();
    }
    void want_ticks(bool wanted) { ticks_wanted_ = wanted; }
    void release_views() {
        if (!engine.has_released()) return;
        for (void* views : engine.take_released()) delete static_cast<Views*>(views);
    }

    isthmus::Engine engine;

 private:
    // The right to drive; not taken when this very thread has it already (a signal handler inside `attend`).
    class Turn {
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
            const nb::gil_scoped_release release;
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

    [[noreturn]] static void fail(PyObject* type, const char* why) {
        PyErr_SetString(type, why);
        throw nb::python_error();
    }
    static void check_signals() {
        if (PyErr_CheckSignals() != 0) throw nb::python_error();
    }

    Outcome drive(nb::handle self, Turn& turn, bool may_yield, std::uint64_t spin_until_ns,
                  std::uint64_t until_ns);
    Outcome wait(std::uint64_t time_ns, std::uint64_t spin_until_ns, std::uint64_t until_ns);
    void attend(nb::handle self);
    void tick(nb::handle self, std::uint64_t time_ns);
    nb::object take_side();
    nb::object take_frame();
    nb::object to_frame(Message& message) const;

    isthmus::Turns turns_;
    std::atomic<unsigned long> driver_{0};
    std::deque<PyObject*> side_;
    bool ticks_wanted_ = false;
    std::uint64_t ticked_ns_ = 0;
    PyObject* frame_type_;
    PyObject* lost_error_;
    PyObject* fabric_error_;
};

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
    for (const isthmus::NativeFailure& failure : engine.take_native_failures())
        self.attr("_native_failed")(failure.channel_id, failure.call_id, failure.function_id, failure.code);
    for (const isthmus::Ready& ready : engine.take_ready())
        self.attr("_attend")(ready.descriptor, ready.events);
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

Outcome Domain::drive(nb::handle self, Turn& turn, bool may_yield, std::uint64_t spin_until_ns,
                      std::uint64_t until_ns) {
    const std::uint64_t spin_ns =
        engine.has_functions() ? spin_until_ns - std::min(spin_until_ns, now_ns()) : 0;
    std::uint64_t native_calls = engine.counters.native_calls.load(std::memory_order_relaxed);
    for (;;) {
        std::uint64_t time_ns = now_ns();
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
            if (time_ns >= until_ns) return outcome;
            outcome = wait(time_ns, spin_until_ns, until_ns);
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
    const std::uint64_t start_ns = now_ns();
    const std::uint64_t until_ns = later(start_ns, timeout_s);
    const std::uint64_t spin_until_ns = std::min(later(start_ns, spin_s), until_ns);
    for (;;) {
        const Outcome outcome = drive(self, turn, true, spin_until_ns, until_ns);
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
    const std::uint64_t start_ns = now_ns();
    const std::uint64_t until_ns = later(start_ns, timeout_s);
    const std::uint64_t spin_until_ns = later(start_ns, spin_s);
    engine.await(channel.id, envelope.outgoing.header.call_id);
    struct Stop {
        isthmus::Engine& engine;
        ~Stop() { engine.stop_awaiting(); }
    } const stop{engine};
    while (!send(channel, envelope)) {
        if (now_ns() >= until_ns) return nb::none();
        const nb::gil_scoped_release release;
        engine.spin(now_ns(), now_ns() + gil_spin_ns);
    }
    const Outcome outcome = drive(self, turn, false, spin_until_ns, until_ns);
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

// Link
// ------------------------------------------------------------------------------------------------------------
struct Link {
    // `domain` stays alive through the Python attribute that UcxChannel keeps.
    Link(nb::handle owner, std::uint32_t id, std::uint64_t key)
        : self(owner), domain(*nb::inst_ptr<Domain>(owner)), channel(domain.engine.open(id, key)) {}

    bool send(int kind, std::uint64_t call_id, std::uint32_t function_id, nb::handle meta, nb::handle data,
              std::uint64_t deadline_ns, int flags, std::uint32_t credits) {
        domain.require_usable();
        Envelope envelope(meta, data);
        FrameHeader& header = envelope.outgoing.header;
        header.kind = static_cast<Kind>(kind);
        header.flags = static_cast<std::uint8_t>(flags);
        header.call_id = call_id;
        header.function_id = function_id;
        header.deadline_ns = deadline_ns;
        header.credits = credits;
        return domain.send(*channel, envelope);
    }
    nb::object call(std::uint64_t call_id, std::uint32_t function_id, nb::handle meta, nb::handle data,
                    std::uint64_t deadline_ns, double spin_s, double timeout_s) {
        Envelope envelope(meta, data);
        FrameHeader& header = envelope.outgoing.header;
        header.kind = Kind::call;
        header.call_id = call_id;
        header.function_id = function_id;
        header.deadline_ns = deadline_ns;
        return domain.call(self, *channel, envelope, spin_s, timeout_s);
    }
    void attach(std::uint32_t peer_id, std::uint64_t peer_key, const nb::bytes& address, bool recovers) {
        domain.require_usable();
        domain.engine.attach(*channel, peer_id, peer_key,
                             {static_cast<const std::byte*>(address.data()), address.size()}, recovers);
    }
    int open_arena() { return domain.engine.open_arena(*channel); }
    void map_arena(int descriptor) { domain.engine.map_arena(*channel, descriptor); }
    void lose(const std::string& reason, std::uint64_t frames_expected) {
        if (domain.engine.is_closed()) return;
        const nb::gil_scoped_release release;
        domain.engine.lose(*channel, reason, frames_expected);
    }
    void detach() {
        if (!domain.engine.usable() || domain.engine.is_closed()) return;
        {
            const nb::gil_scoped_release release;
            domain.engine.close(*channel);
        }
        domain.release_views();
    }
    void define(std::uint32_t function_id, const std::string& path, const std::string& symbol,
                std::size_t result_bytes_max) {
        void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
        void* address = handle == nullptr ? nullptr : dlsym(handle, symbol.c_str());
        if (address == nullptr) throw nb::value_error(dlerror());
        domain.engine.define(*channel, function_id, reinterpret_cast<isthmus::NativeSymbol>(address),
                             result_bytes_max);
    }
    std::string describe() {
        return domain.engine.is_closed() ? std::string() : domain.engine.describe(*channel);
    }

    nb::handle self;
    Domain& domain;
    std::shared_ptr<Channel> channel;
};

nb::dict counters(const Domain& domain) {
    const isthmus::Counters& counts = domain.engine.counters;
    nb::dict result;
    result["frames_in"] = counts.frames_in.load();
    result["frames_out"] = counts.frames_out.load();
    result["frames_dropped"] = counts.frames_dropped.load();
    result["native_calls"] = counts.native_calls.load();
    result["spin_ns"] = counts.spin_ns.load();
    result["sleeps"] = counts.sleeps.load();
    return result;
}

void bind_engine(nb::module_& module) {
    nb::class_<Domain>(module, "Engine", nb::is_weak_referenceable(), "Base of UcxDomain.")
        .def(nb::init<nb::type_object, nb::object, nb::object>(), "frame_type"_a, "lost_error"_a,
             "fabric_error"_a)
        .def(
            "poll",
            [](nb::handle_t<Domain> self, double timeout_s, double spin_s) {
                return nb::inst_ptr<Domain>(self)->poll(self, timeout_s, spin_s);
            },
            "timeout_s"_a, "spin_s"_a = 0.0,
            nb::sig("def poll(self, timeout_s: float, spin_s: float = 0.0) -> isthmus.fabric.channels.Frame "
                    "| None"))
        .def("wake", [](Domain& domain) { domain.engine.wake(); })
        .def("spin_ns", [](const Domain& domain) { return domain.engine.counters.spin_ns.load(); })
        .def("counters", &counters)
        .def_prop_ro("_usable", [](const Domain& domain) { return domain.engine.usable(); })
        .def_prop_ro("_closed", [](const Domain& domain) { return domain.engine.is_closed(); })
        .def_prop_rw(
            "_rendezvous_bytes", [](const Domain& domain) { return domain.engine.rendezvous_bytes; },
            [](Domain& domain, std::size_t bytes) { domain.engine.rendezvous_bytes = bytes; })
        .def("_require_usable", &Domain::require_usable)
        .def("_address",
             [](Domain& domain) {
                 const std::vector<std::byte> address = domain.engine.address();
                 return nb::bytes(address.data(), address.size());
             })
        .def("_describe", [](Domain& domain) { return domain.engine.describe(); })
        .def("_want_ticks", &Domain::want_ticks, "wanted"_a)
        .def("_push", &Domain::push, "frame"_a,
             nb::sig("def _push(self, frame: isthmus.fabric.channels.Frame) -> None"))
        .def(
            "_watch", [](Domain& domain, int fd, std::uint32_t events) { domain.engine.watch(fd, events); },
            "fd"_a, "events"_a)
        .def(
            "_unwatch", [](Domain& domain, int fd) { domain.engine.unwatch(fd); }, "fd"_a)
        .def("_close", &Domain::close);
}

void bind_link(nb::module_& module) {
    nb::class_<Link>(module, "Link", nb::is_weak_referenceable(), "Base of UcxChannel.")
        .def(nb::init<nb::handle, std::uint32_t, std::uint64_t>(), "domain"_a, "id"_a, "key"_a)
        .def("send", &Link::send, "kind"_a, "call_id"_a, "function_id"_a, "meta"_a, "data"_a = nb::tuple(),
             "deadline_ns"_a = 0, "flags"_a = 0, "credits"_a = 0,
             nb::sig(
                 "def send(self, kind: int, call_id: int, function_id: int, meta: "
                 "isthmus.fabric.channels.Buffer, "
                 "data: collections.abc.Sequence[isthmus.fabric.channels.Buffer] = (), deadline_ns: int = 0, "
                 "flags: int = 0, credits: int = 0) -> bool"))
        .def("call", &Link::call, "call_id"_a, "function_id"_a, "meta"_a, "data"_a, "deadline_ns"_a,
             "spin_s"_a, "timeout_s"_a,
             nb::sig("def call(self, call_id: int, function_id: int, meta: isthmus.fabric.channels.Buffer, "
                     "data: collections.abc.Sequence[isthmus.fabric.channels.Buffer], deadline_ns: int, "
                     "spin_s: float, timeout_s: float) -> isthmus.fabric.channels.Frame | None"))
        .def_prop_ro("id", [](const Link& link) { return link.channel->id; })
        .def_prop_ro("own_key", [](const Link& link) { return link.channel->key; })
        .def_prop_ro(
            "alive",
            [](const Link& link) { return link.channel->alive.load() && link.domain.engine.usable(); })
        .def("_attach", &Link::attach, "peer_id"_a, "peer_key"_a, "address"_a, "recovers"_a)
        .def("_open_arena", &Link::open_arena)
        .def("_map_arena", &Link::map_arena, "descriptor"_a)
        .def("_lose", &Link::lose, "reason"_a, "frames_expected"_a)
        .def("_detach", &Link::detach)
        .def("_define", &Link::define, "function_id"_a, "library"_a, "symbol"_a, "result_bytes_max"_a)
        .def("_describe", &Link::describe)
        .def_prop_ro("_frames_out", [](const Link& link) { return link.channel->sequence_out; });
}

}  // namespace

NB_MODULE(_ucx, module) {
    nb::set_leak_warnings(false);  // a forked child leaks its parent's domains on purpose
    module.doc() = "The native data plane; see fabric/ucx.py.";

    module.def("load", &load, "path"_a, "Load this libucp once per process: its real path and its version.");
    module.def(
        "frame_offsets",
        [] {
            return std::vector<std::pair<std::string, std::size_t>>{
                {"version", offsetof(FrameHeader, version)},
                {"kind", offsetof(FrameHeader, kind)},
                {"flags", offsetof(FrameHeader, flags)},
                {"channel_id", offsetof(FrameHeader, channel_id)},
                {"channel_key", offsetof(FrameHeader, channel_key)},
                {"call_id", offsetof(FrameHeader, call_id)},
                {"deadline_ns", offsetof(FrameHeader, deadline_ns)},
                {"function_id", offsetof(FrameHeader, function_id)},
                {"credits", offsetof(FrameHeader, credits)},
                {"meta_bytes", offsetof(FrameHeader, meta_bytes)},
                {"data_bytes", offsetof(FrameHeader, data_bytes)},
                {"reserved", offsetof(FrameHeader, sequence)},
                {"end", sizeof(FrameHeader)},
            };
        },
        "Where each field of the 64-byte header begins; compared with frames.py by a test.");

    const nb::class_<Data> data(module, "Data", nb::type_slots(data_slots),
                                "Received bytes, behind a memoryview.");
    bind_engine(module);
    bind_link(module);
}
