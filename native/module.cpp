// module.cpp: what Python sees of the engine. Only converts and calls. `Engine` (a Domain here) and `Link`
// are the bases of UcxDomain and UcxChannel (fabric/ucx.py), so that poll, send and call are single native
// calls.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <dlfcn.h>

#include <optional>

#include "domain.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using isthmus::Channel;
using isthmus::Data;
using isthmus::Domain;
using isthmus::Envelope;
using isthmus::FrameHeader;
using isthmus::Kind;

// The memory behind a writable buffer of whole words, which its owner keeps alive.
void* words(nb::handle owner, std::size_t bytes) {
    Py_buffer view;
    if (PyObject_GetBuffer(owner.ptr(), &view, PyBUF_WRITABLE) != 0) throw nb::python_error();
    void* memory = view.buf;
    const bool fits = static_cast<std::size_t>(view.len) == bytes &&
                      reinterpret_cast<std::uintptr_t>(memory) % sizeof(std::uint64_t) == 0;
    PyBuffer_Release(&view);
    if (!fits) throw nb::value_error("a meter's words have another size or place");
    return memory;
}

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
                std::size_t result_bytes_max, nb::handle row, nb::handle running) {
        void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
        void* address = handle == nullptr ? nullptr : dlsym(handle, symbol.c_str());
        if (address == nullptr) throw nb::value_error(dlerror());
        isthmus::Meter meter;
        if (!row.is_none()) {
            meter.row = static_cast<isthmus::Meter::Row*>(words(row, sizeof(isthmus::Meter::Row)));
            meter.running = static_cast<std::uint64_t*>(words(running, sizeof(std::uint64_t)));
        }
        domain.engine.define(*channel, function_id, reinterpret_cast<isthmus::NativeSymbol>(address),
                             result_bytes_max, meter);
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
        .def(
            "__init__",
            [](Domain* self, nb::type_object frame_type, nb::object lost_error, nb::object fabric_error) {
                new (self) Domain(loaded_library(), std::move(frame_type), std::move(lost_error),
                                  std::move(fabric_error));
            },
            "frame_type"_a, "lost_error"_a, "fabric_error"_a)
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
        .def_prop_ro("unsent", [](const Link& link) { return link.channel->has_unsent(); })
        .def("_attach", &Link::attach, "peer_id"_a, "peer_key"_a, "address"_a, "recovers"_a)
        .def("_open_arena", &Link::open_arena)
        .def("_map_arena", &Link::map_arena, "descriptor"_a)
        .def("_lose", &Link::lose, "reason"_a, "frames_expected"_a)
        .def("_detach", &Link::detach)
        .def("_define", &Link::define, "function_id"_a, "library"_a, "symbol"_a, "result_bytes_max"_a,
             "row"_a.none() = nb::none(), "running"_a.none() = nb::none())
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
                {"sequence", offsetof(FrameHeader, sequence)},
                {"end", sizeof(FrameHeader)},
            };
        },
        "Where each field of the 64-byte header begins; compared with frames.py by a test.");

    const nb::class_<Data> data(module, "Data", nb::type_slots(isthmus::data_slots()),
                                "Received bytes, behind a memoryview.");
    bind_engine(module);
    bind_link(module);
}
