// Blocks are aligned, large enough, never shared, reused, and capped; threads may take and give at once.
#include <cstring>
#include <thread>
#include <vector>

#include "check.hpp"
#include "pool.hpp"

using isthmus::Buffer;
using isthmus::Pool;

namespace {

void churn(unsigned seed) {
    std::vector<Buffer> held;
    for (unsigned round = 0; round < 2'000; ++round) {
        const std::size_t bytes = (round * 7919 + seed * 104729) % 300'000 + 1;
        Buffer buffer = Buffer::of(bytes);
        CHECK(buffer && buffer.size() == bytes);
        std::memset(buffer.data(), static_cast<int>(seed), bytes);
        held.push_back(std::move(buffer));
        if (held.size() > 8) {
            for (const std::byte byte : held.front().span().first(1))
                CHECK(byte == static_cast<std::byte>(seed));
            held.erase(held.begin());
        }
    }
}

}  // namespace

int main() {
    for (std::size_t bytes = 1; bytes < (std::size_t{1} << 30); bytes = bytes * 3 / 2 + 1) {
        isthmus::Block* block = Pool::shared().take(bytes);
        CHECK(block != nullptr && block->capacity_bytes >= bytes);
        CHECK(block->capacity_bytes <= std::max<std::size_t>(bytes + bytes / 3, 4096));
        CHECK(reinterpret_cast<std::uintptr_t>(block->bytes) % Pool::alignment_bytes == 0);
        Pool::shared().give(block);
        CHECK(Pool::shared().cached_bytes() <= Pool::cached_bytes_max);
    }
    Buffer first = Buffer::of(1 << 20);
    const std::byte* place = first.data();
    first.reset();
    CHECK(!first && first.size() == 0);
    const Buffer second = Buffer::of(1 << 20);
    CHECK(second.data() == place);

    std::vector<std::thread> threads;
    for (unsigned seed = 1; seed <= 4; ++seed) threads.emplace_back(churn, seed);
    for (std::thread& thread : threads) thread.join();
}
