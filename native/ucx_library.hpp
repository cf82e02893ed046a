// ucx_library.hpp: the UCX functions we use, looked up at run time in whichever libucp the site has.
// Invariant: nothing newer than UCX 1.13, so that a distribution's UCX and the newest wheel both serve.
#pragma once

#include <ucp/api/ucp.h>

#include <string>

namespace isthmus {

// clang-format off
#define ISTHMUS_UCX_FUNCTIONS(X)                                                                             \
    X(ucp_get_version) X(ucp_get_version_string) X(ucp_config_read) X(ucp_config_release)                    \
    X(ucp_config_modify) X(ucp_init_version) X(ucp_cleanup) X(ucp_context_print_info) X(ucp_worker_create)   \
    X(ucp_worker_destroy) X(ucp_worker_query) X(ucp_worker_get_address) X(ucp_worker_release_address)        \
    X(ucp_worker_get_efd) X(ucp_worker_arm) X(ucp_worker_progress) X(ucp_worker_set_am_recv_handler)         \
    X(ucp_ep_create) X(ucp_ep_close_nbx) X(ucp_ep_flush_nbx) X(ucp_ep_print_info) X(ucp_am_send_nbx)         \
    X(ucp_am_recv_data_nbx) X(ucp_request_free) X(ucp_request_check_status) X(ucs_status_string)
// clang-format on

struct UcxLibrary {
    static constexpr unsigned api_major = 1;
    static constexpr unsigned api_minor = 13;

#define ISTHMUS_DECLARE(function) decltype(&::function) function = nullptr;
    ISTHMUS_UCX_FUNCTIONS(ISTHMUS_DECLARE)
#undef ISTHMUS_DECLARE

    std::string path;
    std::string version;

    // Throws std::runtime_error, saying why, when it cannot be loaded or is older than 1.13.
    static UcxLibrary load(const std::string& path);
};

}  // namespace isthmus
