# llama.cpp's server, as a program beside the libraries that the package has anyway.

set(LLAMA_BUILD_COMMON ON)
set(LLAMA_BUILD_SERVER ON)
# No page of upstream's (ours lies in megrez_runtime), no processes that a request can start, and no
# TLS: a proxy does that better.
set(LLAMA_BUILD_UI OFF)
set(LLAMA_USE_PREBUILT_UI OFF)
set(LLAMA_SUBPROCESS OFF)
set(LLAMA_OPENSSL OFF)

function(megrez_install_server)
    foreach(target llama-common llama-server-impl llama-server)
        llama_cpp_python_install_target(${target})
    endforeach()
endfunction()
cmake_language(DEFER DIRECTORY ${CMAKE_SOURCE_DIR} CALL megrez_install_server)
