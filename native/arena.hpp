// arena.hpp: large data between two processes of one machine, with a single copy and without the kernel.
// The sender copies into a file in memory that both have mapped; the receiver reads it there and says by one
// store when it is done. Invariants: only the sender hands out blocks, only the receiver gives them back; the
// file's size is sealed, so that no peer can make the other's access fault; what a dead peer had sent stays
// readable.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "forks.hpp"

namespace isthmus {

class Mapping {
 public:
    // Throws std::system_error when it cannot be mapped, or is no sealed file of `bytes`.
    Mapping(int descriptor, std::size_t bytes);
    ~Mapping();
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;

    std::byte* at(std::size_t offset) const { return base_ + offset; }
    std::size_t bytes() const { return bytes_; }
    // False in a forked child: what its parent holds is not the child's to give back.
    bool is_ours() const noexcept { return generation_ == fork_generation(); }

 private:
    std::byte* base_ = nullptr;
    std::size_t bytes_;
    std::uint32_t generation_ = fork_generation();
};

// The 64 bytes before each block, in shared memory.
struct alignas(64) Lease {
    std::atomic<std::uint32_t> taken;
};
static_assert(sizeof(Lease) == 64 && std::atomic<std::uint32_t>::is_always_lock_free);

class Arena {
 public:
    static constexpr std::size_t file_bytes = std::size_t{128}
                                              << 20;  // sparse: only what was used takes memory
    static constexpr std::size_t data_bytes_min = std::size_t{12}
                                                  << 10;  // below it a copy through UCX is as fast

    Arena();
    ~Arena();
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;

    // For the peer, once; the caller closes it.
    int take_descriptor();
    // Where `bytes` of data may be put; nothing when the peer still holds too much.
    std::optional<std::size_t> take(std::size_t bytes);
    std::byte* at(std::size_t offset) const { return mapping_->at(offset); }
    // For data that was not sent after all.
    void give(std::size_t offset) { lease_of(*mapping_, offset).taken.store(0, std::memory_order_relaxed); }

    static Lease& lease_of(const Mapping& mapping, std::size_t offset) {
        return *reinterpret_cast<Lease*>(mapping.at(offset - sizeof(Lease)));
    }

 private:
    struct Spot {
        std::size_t offset;
        std::size_t capacity_bytes;
    };
    bool claim(const Spot& spot);
    bool all_free() const;

    int descriptor_ = -1;
    std::unique_ptr<Mapping> mapping_;
    std::vector<Spot> spots_;
    std::size_t used_bytes_ = 0;
};

}  // namespace isthmus
