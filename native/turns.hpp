// turns.hpp: a fair lock. Who comes first drives first, so that a loop of polls cannot starve a caller.
#pragma once

#include <atomic>
#include <cstdint>

namespace isthmus {

class Turns {
 public:
    bool try_take() {
        std::uint32_t serving = serving_.load(std::memory_order_acquire);
        return next_.compare_exchange_strong(serving, serving + 1, std::memory_order_acquire);
    }
    // Blocks until it is our turn.
    void take() {
        const std::uint32_t ticket = next_.fetch_add(1, std::memory_order_acq_rel);
        for (std::uint32_t serving = serving_.load(std::memory_order_acquire); serving != ticket;
             serving = serving_.load(std::memory_order_acquire))
            serving_.wait(serving, std::memory_order_acquire);
    }
    void release() {
        serving_.fetch_add(1, std::memory_order_release);
        serving_.notify_all();
    }

 private:
    std::atomic<std::uint32_t> next_{0};
    std::atomic<std::uint32_t> serving_{0};
};

}  // namespace isthmus
