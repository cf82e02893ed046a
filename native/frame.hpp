// frame.hpp: header of one frame, the same 64 bytes on a socket, in shared memory and on an RDMA link.
// Invariants: little-endian, no pointers, no padding; the layout of isthmus/fabric/frames.py, which a golden
// test compares. A change of any field raises `frame_version`.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace isthmus {

inline constexpr std::uint16_t frame_version = 1;
inline constexpr std::uint64_t meta_bytes_max = std::uint64_t{64} << 20;
inline constexpr std::uint64_t data_bytes_max = std::uint64_t{1} << 40;
inline constexpr std::uint8_t flags_known = 7;
inline constexpr std::uint8_t flag_no_reply = 2;
inline constexpr std::uint8_t flag_shared = 4;  // `data` is not in the message but in shared memory

enum class Kind : std::uint8_t {
    call = 1,
    result = 2,
    error = 3,
    yield = 4,
    define = 5,
    cancel = 6,
    refused = 7,
    goodbye = 8,
    peer = 9,
    lost = 10,  // made here when a channel's peer is gone, never received
};

struct FrameHeader {
    std::uint16_t version = frame_version;
    Kind kind{};
    std::uint8_t flags = 0;
    std::uint32_t channel_id = 0;   // the number that the receiver gave the channel
    std::uint64_t channel_key = 0;  // the receiver's secret for it
    std::uint64_t call_id = 0;
    std::uint64_t deadline_ns = 0;
    std::uint32_t function_id = 0;
    std::uint32_t credits = 0;
    std::uint64_t meta_bytes = 0;
    std::uint64_t data_bytes = 0;
    std::uint64_t sequence = 0;  // 0 on sockets; in a UCX message the frame's place on its channel, from 0
};
static_assert(sizeof(FrameHeader) == 64 && std::has_unique_object_representations_v<FrameHeader>);
static_assert(std::is_trivially_copyable_v<FrameHeader> && std::endian::native == std::endian::little);
static_assert(offsetof(FrameHeader, kind) == 2 && offsetof(FrameHeader, flags) == 3);
static_assert(offsetof(FrameHeader, channel_id) == 4 && offsetof(FrameHeader, channel_key) == 8);
static_assert(offsetof(FrameHeader, call_id) == 16 && offsetof(FrameHeader, deadline_ns) == 24);
static_assert(offsetof(FrameHeader, function_id) == 32 && offsetof(FrameHeader, credits) == 36);
static_assert(offsetof(FrameHeader, meta_bytes) == 40 && offsetof(FrameHeader, data_bytes) == 48);
static_assert(offsetof(FrameHeader, sequence) == 56);

// Could a peer of this version have sent it?
constexpr bool valid(const FrameHeader& header) {
    return header.version == frame_version && header.kind >= Kind::call && header.kind <= Kind::peer &&
           header.flags <= flags_known && header.meta_bytes <= meta_bytes_max &&
           header.data_bytes <= data_bytes_max;
}

// Does this frame answer a CALL?
constexpr bool answers(Kind kind) {
    return kind == Kind::result || kind == Kind::error || kind == Kind::yield || kind == Kind::refused;
}

}  // namespace isthmus
