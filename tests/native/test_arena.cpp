// Both sides see the same bytes; a block is handed out again only when its reader has given it back.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <set>
#include <system_error>
#include <vector>

#include "check.hpp"
#include "pool.hpp"

using isthmus::Arena;
using isthmus::Buffer;
using isthmus::Mapping;

namespace {

bool is_refused(int descriptor, std::size_t bytes) {
    try {
        const Mapping mapping(descriptor, bytes);
    } catch (const std::system_error&) {
        return true;
    }
    return false;
}

}  // namespace

int main() {
    Arena arena;
    const int descriptor = arena.take_descriptor();
    const auto mapping = std::make_shared<Mapping>(descriptor, Arena::file_bytes);
    CHECK(ftruncate(descriptor, 4096) != 0);  // sealed: no peer can make us fault
    CHECK(is_refused(descriptor, Arena::file_bytes / 2));
    close(descriptor);

    std::set<std::size_t> offsets;
    std::vector<Buffer> held;
    while (const auto offset = arena.take(1 << 20)) {
        CHECK(offsets.insert(*offset).second);
        std::memset(arena.at(*offset), static_cast<int>(held.size()), 1 << 20);
        held.emplace_back(mapping, *offset, 1 << 20);
    }
    CHECK(held.size() > 100);
    for (std::size_t index = 0; index < held.size(); ++index)
        CHECK(held[index].span().back() == static_cast<std::byte>(index));

    const std::byte* third = held[3].data();
    held.erase(held.begin() + 3);
    const auto again = arena.take(1 << 20);
    CHECK(again && mapping->at(*again) == third);
    CHECK(!arena.take(1 << 20));
    CHECK(!arena.take(2 << 20));  // other sizes too, until all is free
    arena.give(*again);
    if (fork() == 0) {  // a forked child's copies give nothing back
        held.clear();
        _exit(0);
    }
    int status = 0;
    wait(&status);
    CHECK(status == 0 && arena.take(1 << 20) == again && !arena.take(1 << 20));
    held.clear();
    arena.give(*again);
    CHECK(arena.take(64 << 20).has_value());

    const int unsealed = memfd_create("unsealed", MFD_CLOEXEC);
    CHECK(ftruncate(unsealed, 4096) == 0 && is_refused(unsealed, 4096) && is_refused(-1, 4096));
    close(unsealed);
}
