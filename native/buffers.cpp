#include "buffers.hpp"

namespace nb = nanobind;

namespace isthmus {
namespace {

constexpr Py_ssize_t meta_copied_bytes = Sending::meta_inline_bytes / 2;  // always travels in the header
constexpr std::size_t large_bytes = std::size_t{1} << 20;

int get_buffer(PyObject* self, Py_buffer* view, int flags) {
    const Buffer& buffer = nb::inst_ptr<Data>(self)->buffer;
    return PyBuffer_FillInfo(view, self, buffer.data(), static_cast<Py_ssize_t>(buffer.size()), 0, flags);
}

}  // namespace

PyType_Slot* data_slots() {
    static PyType_Slot slots[] = {{Py_bf_getbuffer, reinterpret_cast<void*>(get_buffer)}, {0, nullptr}};
    return slots;
}

nb::object to_memoryview(Buffer&& buffer) {
    nb::object data = nb::cast(Data{std::move(buffer)}, nb::rv_policy::move);
    PyObject* view = PyMemoryView_FromObject(data.ptr());
    if (view == nullptr) throw nb::python_error();
    return nb::steal(view);
}

Views::~Views() {
    for (Py_buffer& buffer : buffers) PyBuffer_Release(&buffer);
}

Bytes Views::add(PyObject* object) {
    Py_buffer buffer;
    if (PyObject_GetBuffer(object, &buffer, PyBUF_SIMPLE) != 0) throw nb::python_error();
    buffers.push_back(buffer);
    return {static_cast<const std::byte*>(buffer.buf), static_cast<std::size_t>(buffer.len)};
}

Envelope::Envelope(nb::handle meta, nb::handle data) {
    set_meta(meta.ptr());
    if (!data.is_none()) set_data(data.ptr());
    outgoing.owner = views_.get();
}

bool Envelope::is_large() const {
    std::size_t total = 0;
    for (const Bytes piece : outgoing.data) total += piece.size();
    return total > large_bytes;
}

Views& Envelope::views() {
    if (!views_) views_ = std::make_unique<Views>();
    return *views_;
}

void Envelope::set_meta(PyObject* meta) {
    if (PyBytes_CheckExact(meta) && PyBytes_GET_SIZE(meta) <= meta_copied_bytes) {
        outgoing.meta = {reinterpret_cast<const std::byte*>(PyBytes_AS_STRING(meta)),
                         static_cast<std::size_t>(PyBytes_GET_SIZE(meta))};
    } else {  // may be read after the call, so it must be immutable
        const nb::object bytes = nb::steal(PyBytes_FromObject(meta));
        if (!bytes.is_valid()) throw nb::python_error();
        outgoing.meta = views().add(bytes.ptr());
    }
}

void Envelope::set_data(PyObject* data) {
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

}  // namespace isthmus
