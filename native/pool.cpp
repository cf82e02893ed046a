#include "pool.hpp"

#include <bit>
#include <cstdlib>
#include <new>

namespace isthmus {
namespace {

constexpr std::size_t smallest_bytes = 4096;

struct SizeClass {
    std::size_t index;
    std::size_t bytes;
};

// Four classes per power of two: at most a quarter of a block is unused.
SizeClass size_class(std::size_t bytes) {
    if (bytes <= smallest_bytes) return {0, smallest_bytes};
    const auto exponent = static_cast<std::size_t>(std::bit_width(bytes - 1) - 1);
    const std::size_t step = std::size_t{1} << (exponent - 2);
    const std::size_t rounded = (bytes + step - 1) / step * step;
    return {(exponent * 4) + (rounded / step) - 4, rounded};
}

}  // namespace

Pool& Pool::shared() {
    static Pool* pool = new Pool;  // never deleted, see above
    return *pool;
}

Block* Pool::take(std::size_t bytes) noexcept {
    const SizeClass wanted = size_class(bytes);
    {
        const std::lock_guard guard(lock_);
        if (Block* block = free_[wanted.index]; block != nullptr) {
            free_[wanted.index] = block->next;
            cached_bytes_ -= block->capacity_bytes;
            return block;
        }
    }
    void* memory = std::aligned_alloc(alignment_bytes, wanted.bytes);
    if (memory == nullptr) return nullptr;
    auto* block = new (std::nothrow) Block{static_cast<std::byte*>(memory), wanted.bytes, nullptr};
    if (block == nullptr) std::free(memory);
    return block;
}

void Pool::give(Block* block) noexcept {
    {
        const std::lock_guard guard(lock_);
        if (cached_bytes_ + block->capacity_bytes <= cached_bytes_max) {
            Block*& head = free_[size_class(block->capacity_bytes).index];
            block->next = head;
            head = block;
            cached_bytes_ += block->capacity_bytes;
            return;
        }
    }
    std::free(block->bytes);
    delete block;
}

std::size_t Pool::cached_bytes() noexcept {
    const std::lock_guard guard(lock_);
    return cached_bytes_;
}

}  // namespace isthmus
