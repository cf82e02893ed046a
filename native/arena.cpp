#include "arena.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>
#include <utility>

namespace isthmus {
namespace {

constexpr int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
constexpr std::size_t spots_tried_max = 64;  // keeps a send short when the peer holds many small blocks

[[noreturn]] void fail(const char* what) { throw std::system_error(errno, std::generic_category(), what); }

// A quarter more at most, so that sizes which vary a little share their blocks.
std::size_t rounded(std::size_t bytes) {
    std::size_t step = sizeof(Lease);
    while (step * 8 < bytes) step *= 2;
    return (bytes + step - 1) / step * step;
}

}  // namespace

Mapping::Mapping(int descriptor, std::size_t bytes) : bytes_(bytes) {
    watch_forks();
    struct stat status {};
    const int present = fcntl(descriptor, F_GET_SEALS);
    if (present < 0 || fstat(descriptor, &status) != 0) fail("shared memory of the peer");
    if ((present & seals) != seals || static_cast<std::size_t>(status.st_size) != bytes) {
        errno = EPROTO;
        fail("shared memory of the peer has another size, or may change it");
    }
    void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    if (base == MAP_FAILED) fail("shared memory of the peer");
    base_ = static_cast<std::byte*>(base);
}

Mapping::~Mapping() { munmap(base_, bytes_); }

Arena::Arena() : descriptor_(memfd_create("isthmus-arena", MFD_CLOEXEC | MFD_ALLOW_SEALING)) {
    if (descriptor_ < 0) fail("memfd_create");
    try {
        if (ftruncate(descriptor_, file_bytes) != 0 || fcntl(descriptor_, F_ADD_SEALS, seals) != 0)
            fail("memfd");
        mapping_ = std::make_unique<Mapping>(descriptor_, file_bytes);
    } catch (...) {
        close(descriptor_);
        throw;
    }
}

Arena::~Arena() {
    if (descriptor_ >= 0) close(descriptor_);
}

int Arena::take_descriptor() { return std::exchange(descriptor_, -1); }

std::optional<std::size_t> Arena::take(std::size_t bytes) {
    const std::size_t capacity = rounded(bytes);
    std::size_t tried = 0;
    for (const Spot& spot : spots_)
        if (spot.capacity_bytes == capacity && tried++ < spots_tried_max && claim(spot)) return spot.offset;
    if (used_bytes_ + sizeof(Lease) + capacity > file_bytes) {
        if (sizeof(Lease) + capacity > file_bytes || !all_free()) return std::nullopt;
        spots_.clear();
        used_bytes_ = 0;
    }
    const Spot fresh{used_bytes_ + sizeof(Lease), capacity};
    used_bytes_ += sizeof(Lease) + capacity;
    spots_.push_back(fresh);
    lease_of(*mapping_, fresh.offset).taken.store(1, std::memory_order_relaxed);
    return fresh.offset;
}

bool Arena::claim(const Spot& spot) {
    std::atomic<std::uint32_t>& taken = lease_of(*mapping_, spot.offset).taken;
    if (taken.load(std::memory_order_acquire) != 0) return false;
    taken.store(1, std::memory_order_relaxed);
    return true;
}

bool Arena::all_free() const {
    return std::ranges::all_of(spots_, [this](const Spot& spot) {
        return lease_of(*mapping_, spot.offset).taken.load(std::memory_order_acquire) == 0;
    });
}

}  // namespace isthmus
