// inbox.hpp: received frames in the order in which they will be delivered.
// Invariant: a ring that grows by doubling and never shrinks, so that a steady state allocates nothing.
#pragma once

#include <array>
#include <cstddef>
#include <cstring>
#include <span>
#include <utility>
#include <vector>

#include "frame.hpp"
#include "pool.hpp"

namespace isthmus {

// One received frame; `header.channel_id` is our own number for the channel.
struct Message {
    static constexpr std::size_t small_bytes = 192;

    FrameHeader header;
    Buffer data;
    Buffer large_meta;
    std::array<std::byte, small_bytes> small_meta;

    std::span<const std::byte> meta() const {
        return {large_meta ? large_meta.data() : small_meta.data(), header.meta_bytes};
    }
    // False when memory ran out.
    bool set_meta(std::span<const std::byte> bytes) {
        header.meta_bytes = bytes.size();
        if (bytes.size() > small_bytes && !(large_meta = Buffer::of(bytes.size()))) return false;
        if (!bytes.empty())
            std::memcpy(large_meta ? large_meta.data() : small_meta.data(), bytes.data(), bytes.size());
        return true;
    }
    void clear() {
        data.reset();
        large_meta.reset();
    }
};

class Inbox {
 public:
    static constexpr std::size_t frames_max = std::size_t{1} << 20;  // beyond it a peer ignores its credits

    bool empty() const { return head_ == tail_; }
    bool full() const { return size() >= frames_max; }
    std::size_t size() const { return tail_ - head_; }
    Message& front() { return slots_[head_ & (slots_.size() - 1)]; }
    void pop() {
        front().clear();
        ++head_;
    }
    // A slot at the end, for the caller to fill.
    Message& push() {
        if (size() == slots_.size()) grow();
        return slots_[tail_++ & (slots_.size() - 1)];
    }
    void drop_last() {
        --tail_;
        slots_[tail_ & (slots_.size() - 1)].clear();
    }

 private:
    static constexpr std::size_t slots_first = 64;

    void grow() {
        std::vector<Message> larger(slots_.size() * 2);
        for (std::size_t index = head_; index != tail_; ++index)
            larger[index & (larger.size() - 1)] = std::move(slots_[index & (slots_.size() - 1)]);
        slots_ = std::move(larger);
    }

    std::vector<Message> slots_ = std::vector<Message>(slots_first);
    std::size_t head_ = 0;
    std::size_t tail_ = 0;
};

}  // namespace isthmus
