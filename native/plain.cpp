// plain.cpp: the module `_plain`: calls and results of small builtin values between Python and msgpack, the
// shortest path of fabric/codec.py. It reads and writes the layout PLAIN of fabric/_trees.py, byte for byte.
// Invariants: only None, bool, int, float, str and bytes, of exactly these types, and only what fits a small
// frame; whatever else comes, damaged bytes included, is left to the Python function that was given, which
// decides. So nothing here raises by itself. Knows no UCX.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

namespace {

constexpr std::uint8_t layout_plain = 1;
constexpr std::size_t meta_bytes_max = 1024;  // beyond it, the copy outweighs what is saved here

// msgpack's first bytes.
constexpr std::uint8_t tag_map = 0x80, tag_array = 0x90, tag_text = 0xa0, tag_none = 0xc0, tag_false = 0xc2,
                       tag_true = 0xc3, tag_bytes8 = 0xc4, tag_bytes16 = 0xc5, tag_float64 = 0xcb,
                       tag_uint8 = 0xcc, tag_int8 = 0xd0, tag_text8 = 0xd9, tag_text16 = 0xda,
                       tag_negative = 0xe0;
constexpr std::uint8_t map_max = 15, array_max = 15, text_max = 31;  // what the tag itself can count
constexpr std::int64_t negative_min = -32;

template <typename Number>
Number swapped(Number number) {  // msgpack is big-endian
    std::array<std::byte, sizeof number> bytes = std::bit_cast<std::array<std::byte, sizeof number>>(number);
    for (std::size_t index = 0; index < sizeof number / 2; ++index)
        std::swap(bytes[index], bytes[sizeof number - 1 - index]);
    return std::bit_cast<Number>(bytes);
}

// writing
// ---------------------------------------------------------------------------------------------------------
// Each step says whether it could; after a false the bytes are worthless.
class Writer {
 public:
    Writer() { put_byte(layout_plain); }

    bool put(PyObject* value) {
        if (value == Py_None) return put_byte(tag_none);
        if (PyBytes_CheckExact(value))
            return put_block(PyBytes_AS_STRING(value), PyBytes_GET_SIZE(value), tag_bytes8, tag_bytes16);
        if (PyLong_CheckExact(value)) return put_int(value);
        if (PyUnicode_CheckExact(value)) return put_text(value);
        if (PyFloat_CheckExact(value)) return put_number(tag_float64, PyFloat_AS_DOUBLE(value));
        if (PyBool_Check(value)) return put_byte(value == Py_True ? tag_true : tag_false);
        return false;
    }
    bool put_call(PyObject* args, PyObject* kwargs) {
        return PyTuple_CheckExact(args) && PyDict_CheckExact(kwargs) && put_byte(tag_array | 2) &&
               put_args(args) && put_kwargs(kwargs);
    }
    PyObject* meta() const {
        return PyBytes_FromStringAndSize(bytes_.data(), static_cast<Py_ssize_t>(size_));
    }

 private:
    bool put_args(PyObject* args) {
        const Py_ssize_t count = PyTuple_GET_SIZE(args);
        if (count > array_max || !put_byte(static_cast<std::uint8_t>(tag_array | count))) return false;
        for (Py_ssize_t index = 0; index < count; ++index)
            if (!put(PyTuple_GET_ITEM(args, index))) return false;
        return true;
    }
    bool put_kwargs(PyObject* kwargs) {
        const Py_ssize_t count = PyDict_GET_SIZE(kwargs);
        if (count > map_max || !put_byte(static_cast<std::uint8_t>(tag_map | count))) return false;
        PyObject *name = nullptr, *value = nullptr;
        for (Py_ssize_t position = 0; PyDict_Next(kwargs, &position, &name, &value) != 0;)
            if (!PyUnicode_CheckExact(name) || !put_text(name) || !put(value)) return false;
        return true;
    }
    bool put_int(PyObject* value) {
        int overflow = 0;
        const long long number = PyLong_AsLongLongAndOverflow(value, &overflow);
        if (overflow != 0) return false;
        if (number >= 0) return put_unsigned(static_cast<std::uint64_t>(number));
        if (number >= negative_min) return put_byte(static_cast<std::uint8_t>(number));
        if (number >= std::numeric_limits<std::int8_t>::min())
            return put_number(tag_int8, static_cast<std::int8_t>(number));
        if (number >= std::numeric_limits<std::int16_t>::min())
            return put_number(tag_int8 + 1, static_cast<std::int16_t>(number));
        if (number >= std::numeric_limits<std::int32_t>::min())
            return put_number(tag_int8 + 2, static_cast<std::int32_t>(number));
        return put_number(tag_int8 + 3, static_cast<std::int64_t>(number));
    }
    bool put_unsigned(std::uint64_t number) {
        if (number < tag_map) return put_byte(static_cast<std::uint8_t>(number));
        if (number <= UINT8_MAX) return put_number(tag_uint8, static_cast<std::uint8_t>(number));
        if (number <= UINT16_MAX) return put_number(tag_uint8 + 1, static_cast<std::uint16_t>(number));
        if (number <= UINT32_MAX) return put_number(tag_uint8 + 2, static_cast<std::uint32_t>(number));
        return put_number(tag_uint8 + 3, number);
    }
    bool put_text(PyObject* text) {
        Py_ssize_t size = 0;
        const char* utf8 = PyUnicode_AsUTF8AndSize(text, &size);
        if (utf8 == nullptr) {  // a lone surrogate
            PyErr_Clear();
            return false;
        }
        if (static_cast<std::size_t>(size) > text_max) return put_block(utf8, size, tag_text8, tag_text16);
        return put_byte(static_cast<std::uint8_t>(tag_text | static_cast<std::uint8_t>(size))) &&
               put_raw(utf8, static_cast<std::size_t>(size));
    }
    bool put_block(const char* block, Py_ssize_t size, std::uint8_t tag8, std::uint8_t tag16) {
        const auto count = static_cast<std::size_t>(size);
        if (count > meta_bytes_max) return false;
        const bool tagged = count <= UINT8_MAX ? put_number(tag8, static_cast<std::uint8_t>(count))
                                               : put_number(tag16, static_cast<std::uint16_t>(count));
        return tagged && put_raw(block, count);
    }
    template <typename Number>
    bool put_number(std::uint8_t tag, Number number) {
        const Number big_endian = swapped(number);
        return put_byte(tag) && put_raw(&big_endian, sizeof big_endian);
    }
    bool put_byte(std::uint8_t byte) { return put_raw(&byte, 1); }
    bool put_raw(const void* source, std::size_t count) {
        if (count > bytes_.size() - size_) return false;
        std::memcpy(bytes_.data() + size_, source, count);
        size_ += count;
        return true;
    }

    std::array<char, meta_bytes_max> bytes_;
    std::size_t size_ = 0;
};

// reading
// ---------------------------------------------------------------------------------------------------------
// Each step gives a new reference or nullptr, and then an error may be set.
class Reader {
 public:
    explicit Reader(PyObject* meta) {
        if (!PyBytes_CheckExact(meta)) return;
        next_ = reinterpret_cast<const std::uint8_t*>(PyBytes_AS_STRING(meta));
        left_ = static_cast<std::size_t>(PyBytes_GET_SIZE(meta));
    }

    PyObject* value() { return take_byte() == layout_plain ? whole(take()) : nullptr; }
    PyObject* call() {
        if (take_byte() != layout_plain || take_byte() != (tag_array | 2)) return nullptr;
        PyObject* args = take_args();
        PyObject* kwargs = args == nullptr ? nullptr : take_kwargs();
        PyObject* call = kwargs == nullptr ? nullptr : PyTuple_Pack(2, args, kwargs);
        Py_XDECREF(args);
        Py_XDECREF(kwargs);
        return whole(call);
    }

 private:
    PyObject* whole(PyObject* value) {
        if (left_ == 0) return value;
        Py_XDECREF(value);
        return nullptr;
    }
    PyObject* take() {
        const std::uint8_t tag = take_byte();
        if (broken_) return nullptr;
        if (tag < tag_map) return PyLong_FromLong(tag);
        if (tag >= tag_negative) return PyLong_FromLong(static_cast<std::int8_t>(tag));
        if (tag >= tag_text && tag <= (tag_text | text_max)) return take_text(tag & text_max);
        switch (tag) {
            case tag_none:
                return Py_NewRef(Py_None);
            case tag_false:
                return Py_NewRef(Py_False);
            case tag_true:
                return Py_NewRef(Py_True);
            case tag_bytes8:
                return take_bytes(take_number<std::uint8_t>());
            case tag_bytes16:
                return take_bytes(take_number<std::uint16_t>());
            case tag_text8:
                return take_text(take_number<std::uint8_t>());
            case tag_text16:
                return take_text(take_number<std::uint16_t>());
            case tag_float64:
                return checked(PyFloat_FromDouble(take_number<double>()));
            case tag_uint8:
                return checked(PyLong_FromUnsignedLong(take_number<std::uint8_t>()));
            case tag_uint8 + 1:
                return checked(PyLong_FromUnsignedLong(take_number<std::uint16_t>()));
            case tag_uint8 + 2:
                return checked(PyLong_FromUnsignedLong(take_number<std::uint32_t>()));
            case tag_uint8 + 3:
                return checked(PyLong_FromUnsignedLongLong(take_number<std::uint64_t>()));
            case tag_int8:
                return checked(PyLong_FromLong(take_number<std::int8_t>()));
            case tag_int8 + 1:
                return checked(PyLong_FromLong(take_number<std::int16_t>()));
            case tag_int8 + 2:
                return checked(PyLong_FromLong(take_number<std::int32_t>()));
            case tag_int8 + 3:
                return checked(PyLong_FromLongLong(take_number<std::int64_t>()));
            default:
                return nullptr;
        }
    }
    PyObject* take_args() {
        const std::uint8_t tag = take_byte();
        if ((tag & ~array_max) != tag_array) return nullptr;
        const Py_ssize_t count = tag & array_max;
        PyObject* args = PyTuple_New(count);
        for (Py_ssize_t index = 0; args != nullptr && index < count; ++index) {
            if (PyObject* value = take()) {
                PyTuple_SET_ITEM(args, index, value);
            } else {
                Py_CLEAR(args);
            }
        }
        return args;
    }
    PyObject* take_kwargs() {
        const std::uint8_t tag = take_byte();
        if ((tag & ~map_max) != tag_map) return nullptr;
        PyObject* kwargs = PyDict_New();
        for (int left = tag & map_max; kwargs != nullptr && left != 0; --left)
            if (!take_entry(kwargs)) Py_CLEAR(kwargs);
        return kwargs;
    }
    bool take_entry(PyObject* kwargs) {
        PyObject* name = take();
        PyObject* value = name != nullptr && PyUnicode_CheckExact(name) ? take() : nullptr;
        const bool taken = value != nullptr && PyDict_SetItem(kwargs, name, value) == 0;
        Py_XDECREF(name);
        Py_XDECREF(value);
        return taken;
    }
    PyObject* take_bytes(std::size_t count) {
        const char* block = take_raw(count);
        return block == nullptr ? nullptr : PyBytes_FromStringAndSize(block, static_cast<Py_ssize_t>(count));
    }
    PyObject* take_text(std::size_t count) {
        const char* utf8 = take_raw(count);
        return utf8 == nullptr ? nullptr
                               : PyUnicode_DecodeUTF8(utf8, static_cast<Py_ssize_t>(count), "strict");
    }
    template <typename Number>
    Number take_number() {
        Number number{};
        if (const char* bytes = take_raw(sizeof number)) std::memcpy(&number, bytes, sizeof number);
        return swapped(number);
    }
    std::uint8_t take_byte() { return take_number<std::uint8_t>(); }
    const char* take_raw(std::size_t count) {
        broken_ |= count > left_;
        if (broken_) return nullptr;
        left_ -= count;
        return reinterpret_cast<const char*>(std::exchange(next_, next_ + count));
    }
    // A number that was cut off is none.
    PyObject* checked(PyObject* number) {
        if (broken_) Py_CLEAR(number);
        return number;
    }

    const std::uint8_t* next_ = nullptr;
    std::size_t left_ = 0;
    bool broken_ = false;
};

// the functions
// ---------------------------------------------------------------------------------------------------------
using Arguments = PyObject* const*;

PyObject* leave_to(PyObject* otherwise, Arguments arguments, Py_ssize_t count) {
    PyErr_Clear();
    return PyObject_Vectorcall(otherwise, arguments, static_cast<std::size_t>(count), nullptr);
}

PyObject* packed(const Writer& writer) {
    PyObject* meta = writer.meta();
    PyObject* data = meta == nullptr ? nullptr : PyTuple_New(0);
    PyObject* pair = data == nullptr ? nullptr : PyTuple_Pack(2, meta, data);
    Py_XDECREF(meta);
    Py_XDECREF(data);
    return pair;
}

PyObject* pack_call(PyObject* otherwise, Arguments arguments, Py_ssize_t count) {
    Writer writer;
    if (count == 2 && writer.put_call(arguments[0], arguments[1])) return packed(writer);
    return leave_to(otherwise, arguments, count);
}

PyObject* pack_value(PyObject* otherwise, Arguments arguments, Py_ssize_t count) {
    Writer writer;
    if (count == 1 && writer.put(arguments[0])) return packed(writer);
    return leave_to(otherwise, arguments, count);
}

PyObject* decode_call(PyObject* otherwise, Arguments arguments, Py_ssize_t count) {
    PyObject* call = count == 2 ? Reader(arguments[0]).call() : nullptr;
    return call != nullptr ? call : leave_to(otherwise, arguments, count);
}

PyObject* decode_value(PyObject* otherwise, Arguments arguments, Py_ssize_t count) {
    PyObject* value = count == 2 ? Reader(arguments[0]).value() : nullptr;
    return value != nullptr ? value : leave_to(otherwise, arguments, count);
}

template <typename Function>
PyCFunction as_method(Function function) {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

std::array<PyMethodDef, 4> shortcuts{{
    {"pack_call", as_method(pack_call), METH_FASTCALL, nullptr},
    {"pack_value", as_method(pack_value), METH_FASTCALL, nullptr},
    {"decode_call", as_method(decode_call), METH_FASTCALL, nullptr},
    {"decode_value", as_method(decode_value), METH_FASTCALL, nullptr},
}};

// A decorator: the shortcut, bound (`__self__`) to the Python function that it falls back to.
template <std::size_t index>
PyObject* bind(PyObject* /*module*/, PyObject* otherwise) {
    return PyCFunction_NewEx(&shortcuts[index], otherwise, nullptr);
}

std::array<PyMethodDef, 5> decorators{{
    {"pack_call", bind<0>, METH_O, nullptr},
    {"pack_value", bind<1>, METH_O, nullptr},
    {"decode_call", bind<2>, METH_O, nullptr},
    {"decode_value", bind<3>, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
}};

PyModuleDef definition{
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "_plain",
    .m_doc = "Shortcuts for small builtin values; see fabric/codec.py.",
    .m_size = 0,
    .m_methods = decorators.data(),
};

}  // namespace

// NOLINTNEXTLINE(bugprone-reserved-identifier): the name that Python looks for
PyMODINIT_FUNC PyInit__plain() { return PyModule_Create(&definition); }
