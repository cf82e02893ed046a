#include "ucx_library.hpp"

#include <dlfcn.h>

#include <stdexcept>

namespace isthmus {
namespace {

template <typename Function>
void resolve(void* handle, const char* name, Function& function) {
    void* symbol = dlsym(handle, name);
    if (symbol == nullptr) throw std::runtime_error(std::string("no ") + name + " in this UCX");
    function = reinterpret_cast<Function>(symbol);
}

}  // namespace

UcxLibrary UcxLibrary::load(const std::string& path) {
    // Never closed: UCX keeps threads and memory hooks that point into it.
    void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL);
    if (handle == nullptr) throw std::runtime_error(dlerror());
    UcxLibrary library;
#define ISTHMUS_RESOLVE(function) resolve(handle, #function, library.function);
    ISTHMUS_UCX_FUNCTIONS(ISTHMUS_RESOLVE)
#undef ISTHMUS_RESOLVE
    unsigned major = 0;
    unsigned minor = 0;
    unsigned release = 0;
    library.ucp_get_version(&major, &minor, &release);
    library.version = library.ucp_get_version_string();
    if (major != api_major || minor < api_minor)
        throw std::runtime_error("UCX " + library.version + " is not a 1.x of at least 1.13");
    Dl_info info{};
    library.path =
        dladdr(reinterpret_cast<void*>(library.ucp_get_version), &info) != 0 ? info.dli_fname : path;
    return library;
}

}  // namespace isthmus
