// domain.hpp: the engine as Python drives it: who may, when to spin or sleep, and when to drop the GIL.
// Invariant: the GIL is never taken while the engine's lock is held. Not here: the bindings (module.cpp).
#pragma once

#include <nanobind/nanobind.h>

#include <atomic>
#include <cstdint>
#include <deque>

#include "buffers.hpp"
#include "engine.hpp"
#include "turns.hpp"

namespace isthmus {

class Domain {
 public:
    Domain(const UcxLibrary& library, nanobind::type_object frame_type, nanobind::object lost_error,
           nanobind::object fabric_error);
    ~Domain();
    Domain(const Domain&) = delete;
    Domain& operator=(const Domain&) = delete;

    void require_usable() const {
        if (!engine.usable())
            fail(fabric_error_, "this domain belongs to the parent process; open a new one after a fork");
        if (engine.is_closed()) fail(fabric_error_, "the domain is closed");
    }
    [[noreturn]] void fail_lost(const char* why) const { fail(lost_error_, why); }
    [[noreturn]] void fail_fabric(const char* why) const { fail(fabric_error_, why); }

    nanobind::object poll(nanobind::handle self, double timeout_s, double spin_s);
    nanobind::object call(nanobind::handle self, Channel& channel, Envelope& envelope, double spin_s,
                          double timeout_s);
    bool send(Channel& channel, Envelope& envelope);
    void close();

    // A frame that did not come by UCX; the next poll returns it.
    void push(nanobind::object frame) {
        side_.push_back(frame.release().ptr());
        engine.interrupt();
    }
    void want_ticks(bool wanted) { ticks_wanted_ = wanted; }
    void release_views() {
        if (!engine.has_released()) return;
        for (void* views : engine.take_released()) delete static_cast<Views*>(views);
    }

    Engine engine;

 private:
    // The right to drive; not taken when this very thread has it already (a signal handler inside `attend`).
    class Turn;
    [[noreturn]] static void fail(PyObject* type, const char* why) {
        PyErr_SetString(type, why);
        throw nanobind::python_error();
    }
    static void check_signals() {
        if (PyErr_CheckSignals() != 0) throw nanobind::python_error();
    }

    struct Times;
    Outcome drive(nanobind::handle self, Turn& turn, bool may_yield, Times times);
    Outcome wait(std::uint64_t time_ns, std::uint64_t spin_until_ns, std::uint64_t until_ns);
    void attend(nanobind::handle self);
    void tick(nanobind::handle self, std::uint64_t time_ns);
    nanobind::object take_side();
    nanobind::object take_frame();
    nanobind::object to_frame(Message& message) const;

    Turns turns_;
    std::atomic<unsigned long> driver_{0};
    std::deque<PyObject*> side_;
    bool ticks_wanted_ = false;
    std::uint64_t ticked_ns_ = 0;
    PyObject* frame_type_;
    PyObject* lost_error_;
    PyObject* fabric_error_;
};

}  // namespace isthmus
