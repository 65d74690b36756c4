# CMake reads this right after llama.cpp's project(). It leaves out what llama_cpp never loads and
# compiles small files together: a third of the work. ggml, so every kernel, is left as it is.

option(MEGREZ_SERVER "build llama.cpp's server, which `megrez-gguf serve` starts" ON)
if(MEGREZ_SERVER)
    include(${CMAKE_CURRENT_LIST_DIR}/server.cmake)
elseif(NOT (LLAMA_BUILD_TOOLS OR LLAMA_BUILD_SERVER OR LLAMA_BUILD_TESTS OR LLAMA_BUILD_EXAMPLES
        OR LLAMA_BUILD_APP))
    # llama-common serves llama.cpp's own programs only.
    set(LLAMA_BUILD_COMMON OFF)
endif()

# Most of a small file's time goes into the headers it shares with the others of its library, so
# sixteen are compiled as one (upstream: those of llama's models only), save those matching `alone`.
function(megrez_compile_together target alone)
    if(NOT TARGET ${target})
        return()
    endif()
    get_target_property(folder ${target} SOURCE_DIR)
    get_target_property(sources ${target} SOURCES)
    foreach(source IN LISTS sources)
        get_filename_component(path ${source} ABSOLUTE BASE_DIR ${folder})
        set(skip OFF)
        if(path MATCHES "${alone}")
            set(skip ON)
        endif()
        set_source_files_properties(${path} TARGET_DIRECTORY ${target}
            PROPERTIES SKIP_UNITY_BUILD_INCLUSION ${skip})
    endforeach()
    set_target_properties(${target} PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 16)
endfunction()

# This one has a static function named as one in llama-graph.cpp.
cmake_language(DEFER CALL megrez_compile_together llama "/llama-kv-cache-dsv4[.]cpp$")
# mtmd's public side must not see the headers of its inside.
cmake_language(DEFER DIRECTORY ${CMAKE_SOURCE_DIR}
    CALL megrez_compile_together mtmd "/mtmd/[^/]*$")
