// Any 64 bytes are either a valid header or refused; nothing in between.
#include <cstring>
#include <random>

#include "check.hpp"
#include "frame.hpp"

using isthmus::FrameHeader;
using isthmus::Kind;

int main() {
    FrameHeader header;
    header.kind = Kind::call;
    CHECK(isthmus::valid(header));
    header.version = 2;
    CHECK(!isthmus::valid(header));
    header.version = isthmus::frame_version;
    header.kind = Kind::lost;  // never on the wire
    CHECK(!isthmus::valid(header));
    header.kind = Kind::peer;
    header.flags = isthmus::flags_known + 1;
    CHECK(!isthmus::valid(header));
    header.flags = isthmus::flags_known;
    header.meta_bytes = isthmus::meta_bytes_max + 1;
    CHECK(!isthmus::valid(header));
    header.meta_bytes = isthmus::meta_bytes_max;
    header.data_bytes = isthmus::data_bytes_max + 1;
    CHECK(!isthmus::valid(header));

    std::mt19937_64 random(1);
    for (int round = 0; round < 100'000; ++round) {
        std::uint64_t words[8];
        for (std::uint64_t& word : words) word = random();
        std::memcpy(&header, words, sizeof header);
        if (!isthmus::valid(header)) continue;
        CHECK(header.version == isthmus::frame_version && header.data_bytes <= isthmus::data_bytes_max);
    }
    CHECK(isthmus::answers(Kind::yield) && !isthmus::answers(Kind::call) && !isthmus::answers(Kind::lost));
}
