// forks.hpp: what a fork changes. A child shares its parent's endpoints and shared memory, and must leave
// both alone.
#pragma once

#include <cstdint>

namespace isthmus {

// From now on forks are counted and leave the pool usable in the child. Throws std::system_error.
void watch_forks();

// How many forks lie between this process and the one that first watched.
std::uint32_t fork_generation() noexcept;

}  // namespace isthmus
