// channel.hpp: what the engine knows about one peer, and what it keeps for one message in flight.
// Invariant: every field is guarded by the engine's lock, except the atomics.
#pragma once

#include <ucp/api/ucp.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "arena.hpp"
#include "frame.hpp"
#include "inbox.hpp"
#include "pool.hpp"

namespace isthmus {

inline constexpr unsigned message_id = 7;  // of our UCX active messages

// A C function that answers CALLs by itself; see channels.Domain.define_native for its contract.
using NativeSymbol = std::int32_t (*)(const void* arguments, std::uint64_t arguments_bytes, void* result,
                                      std::uint64_t* result_bytes);

// Where the calls of one function are counted, in memory that its owner keeps. The times are now_ns().
struct Meter {
    struct Row {
        std::uint64_t calls, errors, busy_ns, last_ns;
    };
    Row* row = nullptr;
    std::uint64_t* running = nullptr;  // not 0 while the function runs
};

struct NativeFunction {
    std::uint32_t function_id = 0;
    NativeSymbol symbol = nullptr;
    Buffer result;  // scratch for one result; calls never overlap
    Meter meter;
    std::uint64_t usual_ns = 0;  // of the last call that was timed
    unsigned untimed = 0;        // calls that are taken to be like it, before the next is timed
};

// A frame that came before its turn, or whose data is still on its way.
struct Arrival {
    Message message;
    bool complete = false;
    bool is_shared = false;  // complete once the arena is mapped, its data at `offset_bytes`
    std::uint64_t offset_bytes = 0;
};

struct Channel {
    Channel(std::uint32_t own_id, std::uint64_t own_key) : id(own_id), key(own_key) {}

    const std::uint32_t id;
    const std::uint64_t key;
    std::uint32_t peer_id = 0;
    std::uint64_t peer_key = 0;
    ucp_ep_h endpoint = nullptr;
    std::atomic<bool> alive{true};
    std::atomic<bool> failed{false};  // UCX gave the endpoint up
    bool closed = false;
    bool recovers = true;
    std::uint64_t sequence_out = 0;
    std::uint64_t sequence_in = 0;
    std::atomic<std::uint32_t> sends_outstanding{0};
    std::map<std::uint64_t, std::unique_ptr<Arrival>> arrivals;  // by sequence number
    std::vector<NativeFunction> functions;
    std::unique_ptr<Arena> arena;       // for data that we send
    std::shared_ptr<Mapping> arena_in;  // the peer's, for data that we receive
    std::string lost_because;

    // Under the engine's lock, which spares the price of an atomic addition.
    void count_sending() {
        sends_outstanding.store(sends_outstanding.load(std::memory_order_relaxed) + 1,
                                std::memory_order_relaxed);
    }
    void count_sent() {
        sends_outstanding.store(sends_outstanding.load(std::memory_order_relaxed) - 1,
                                std::memory_order_release);
    }

    // Frames of ours have not left: they would die with this process. Every call asks it, so without the
    // lock: a sender sees its own sends, and whoever sees that the last has left, whichever thread drove it
    // out, may write where its data lay.
    bool has_unsent() const {
        return sends_outstanding.load(std::memory_order_acquire) != 0 &&
               alive.load(std::memory_order_relaxed);
    }
};

// One send in flight. UCX reads header and meta from here, and the data from `pieces`, until it is done.
struct Sending {
    static constexpr std::size_t meta_inline_bytes = 1024;  // the offset of shared data included
    static constexpr std::size_t pieces_inline = 6;

    FrameHeader header;
    std::array<std::byte, meta_inline_bytes> meta;  // directly behind the header: both are one UCX header
    std::array<ucp_dt_iov_t, pieces_inline> pieces{};
    std::vector<ucp_dt_iov_t> more_pieces;
    Buffer copy;
    void* owner = nullptr;
    std::uint32_t channel_id = 0;
    class Engine* engine = nullptr;
    Sending* next = nullptr;
};
static_assert(offsetof(Sending, meta) == sizeof(FrameHeader));

// One rendezvous receive in flight.
struct Receiving {
    class Engine* engine = nullptr;
    std::uint32_t channel_id = 0;
    std::uint64_t sequence = 0;
    Buffer payload;
};

}  // namespace isthmus
