// buffers.hpp: Python's buffers as the engine's bytes, and back. Invariant: needs the GIL; no bytes are
// copied except a short meta. Not here: who sends them and when (module.cpp).
#pragma once

#include <nanobind/nanobind.h>

#include <memory>
#include <vector>

#include "engine.hpp"

namespace isthmus {

// Received data as a writable Python buffer; the pool gets it back when the last view is gone.
struct Data {
    Buffer buffer;
};

PyType_Slot* data_slots();
nanobind::object to_memoryview(Buffer&& buffer);

// The Python buffers of one send, held until UCX is done with them.
struct Views {
    std::vector<Py_buffer> buffers;
    std::vector<Bytes> spans;

    Views() = default;
    Views(const Views&) = delete;
    Views& operator=(const Views&) = delete;
    ~Views();
    Bytes add(PyObject* object);
};

// The arguments of a send, as the engine wants them.
class Envelope {
 public:
    Envelope(nanobind::handle meta, nanobind::handle data);
    // The engine has taken the owner over.
    void sent() { static_cast<void>(views_.release()); }
    // Is copying the data worth letting other threads run?
    bool is_large() const;

    Outgoing outgoing{};

 private:
    Views& views();
    void set_meta(PyObject* meta);
    void set_data(PyObject* data);

    std::unique_ptr<Views> views_;
};

}  // namespace isthmus
