// The inbox is a queue, whatever the interleaving of pushes and pops, and keeps every frame's bytes.
#include <cstring>
#include <deque>
#include <random>
#include <vector>

#include "check.hpp"
#include "inbox.hpp"

int main() {
    isthmus::Inbox inbox;
    std::deque<std::vector<std::byte>> expected;
    std::mt19937 random(2);
    for (int round = 0; round < 50'000; ++round) {
        if (random() % 5 < 3 && expected.size() < 1000) {
            std::vector<std::byte> meta(random() % 600, static_cast<std::byte>(random()));
            isthmus::Message& message = inbox.push();
            CHECK(message.set_meta(meta));
            expected.push_back(std::move(meta));
        } else if (!expected.empty()) {
            const isthmus::Message message = std::move(inbox.front());
            inbox.pop();
            CHECK(message.header.meta_bytes == expected.front().size());
            CHECK(expected.front().empty() ||
                  std::memcmp(message.meta().data(), expected.front().data(), expected.front().size()) == 0);
            expected.pop_front();
        }
        CHECK(inbox.size() == expected.size() && inbox.empty() == expected.empty());
    }
    inbox.push();
    inbox.drop_last();
    CHECK(inbox.size() == expected.size());
}
