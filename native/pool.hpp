// pool.hpp: buffers for received data, 64-byte aligned and reused, because a fresh page costs more than its
// copy. Invariant: a Block is in the pool or has exactly one owner (a `Buffer`), which may outlive every
// engine. A Buffer may instead show a block of a peer's arena, and then gives that back.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <utility>

#include "arena.hpp"

namespace isthmus {

struct Block {
    std::byte* bytes = nullptr;
    std::size_t capacity_bytes = 0;
    Block* next = nullptr;
};

// One per process, never destroyed: Python may release a buffer after everything else is gone.
class Pool {
 public:
    static constexpr std::size_t alignment_bytes = 64;
    static constexpr std::size_t cached_bytes_max = std::size_t{256} << 20;  // above it, freed blocks go back

    static Pool& shared();

    // Null when the system has no memory left.
    Block* take(std::size_t bytes) noexcept;
    void give(Block* block) noexcept;
    std::size_t cached_bytes() noexcept;

    // A forked child inherits the lock; these keep it usable there.
    void before_fork() { lock_.lock(); }
    void after_fork() { lock_.unlock(); }

 private:
    static constexpr std::size_t classes = 256;

    std::mutex lock_;
    std::size_t cached_bytes_ = 0;
    std::array<Block*, classes> free_{};
};

// Owns a block, of the pool or of a peer's arena, and shows `size` bytes of it.
class Buffer {
 public:
    Buffer() = default;
    Buffer(Block* block, std::size_t size_bytes) : block_(block), size_bytes_(size_bytes) {}
    Buffer(std::shared_ptr<Mapping> mapping, std::size_t offset_bytes, std::size_t size_bytes)
        : mapping_(std::move(mapping)), offset_bytes_(offset_bytes), size_bytes_(size_bytes) {}
    Buffer(Buffer&& other) noexcept
        : block_(std::exchange(other.block_, nullptr)),
          mapping_(std::move(other.mapping_)),
          offset_bytes_(std::exchange(other.offset_bytes_, 0)),
          size_bytes_(std::exchange(other.size_bytes_, 0)) {}
    Buffer& operator=(Buffer&& other) noexcept {
        std::swap(block_, other.block_);
        std::swap(mapping_, other.mapping_);
        std::swap(offset_bytes_, other.offset_bytes_);
        std::swap(size_bytes_, other.size_bytes_);
        return *this;
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { reset(); }

    // Empty when memory ran out.
    static Buffer of(std::size_t bytes) noexcept {
        Block* block = Pool::shared().take(bytes);
        return block == nullptr ? Buffer() : Buffer(block, bytes);
    }

    void reset() noexcept {
        if (block_ != nullptr) Pool::shared().give(std::exchange(block_, nullptr));
        if (mapping_ != nullptr) give_back();
        offset_bytes_ = size_bytes_ = 0;
    }
    // From now on show what follows the first `bytes`.
    void skip(std::size_t bytes) {
        offset_bytes_ += bytes;
        size_bytes_ -= bytes;
    }
    explicit operator bool() const { return block_ != nullptr || mapping_ != nullptr; }
    std::byte* data() const {
        if (mapping_ != nullptr) return mapping_->at(offset_bytes_);
        return block_ == nullptr ? nullptr : block_->bytes + offset_bytes_;
    }
    std::size_t size() const { return size_bytes_; }
    std::span<const std::byte> span() const { return {data(), size_bytes_}; }

 private:
    void give_back() noexcept {
        if (mapping_->is_ours())
            Arena::lease_of(*mapping_, offset_bytes_).taken.store(0, std::memory_order_release);
        mapping_.reset();
    }

    Block* block_ = nullptr;
    std::shared_ptr<Mapping> mapping_;
    std::size_t offset_bytes_ = 0;
    std::size_t size_bytes_ = 0;
};

}  // namespace isthmus
