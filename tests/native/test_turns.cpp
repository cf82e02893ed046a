// One driver at a time, and who asked first goes first.
#include <thread>
#include <vector>

#include "check.hpp"
#include "turns.hpp"

int main() {
    isthmus::Turns turns;
    CHECK(turns.try_take());
    CHECK(!turns.try_take());
    turns.release();

    int inside = 0;  // guarded by turns: TSan watches
    std::vector<std::thread> threads;
    for (int thread = 0; thread < 4; ++thread)
        threads.emplace_back([&] {
            for (int round = 0; round < 2'000; ++round) {
                if (round % 2 == 0 || !turns.try_take()) turns.take();
                ++inside;
                turns.release();
            }
        });
    for (std::thread& thread : threads) thread.join();
    CHECK(inside == 8'000 && turns.try_take());
}
