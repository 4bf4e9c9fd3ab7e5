# The steps of CMakeLists.txt.

# One line, not wrapped: CMake leaves a line alone that starts with a space.
function(rkv_fail text)
    message(FATAL_ERROR " ${text}")
endfunction()

function(rkv_require_compiler)
    include(CheckLanguage)
    foreach (language C CXX)
        check_language(${language})
        if (NOT CMAKE_${language}_COMPILER)
            rkv_fail("rkv-local: error: no working C and C++ compiler found: install one (Debian: apt install g++; macOS: xcode-select --install; Windows: Visual Studio Build Tools) or set CC and CXX")
        endif()
    endforeach()
endfunction()

# Sets LLAMA_CPP_PYTHON_VERSION, LLAMA_CPP_COMMIT and LLAMA_CPP_PYTHON_SHA256.
function(rkv_read_pin file)
    set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${file}")
    file(STRINGS "${file}" lines REGEX "^[A-Z0-9_]+=")
    foreach (line IN LISTS lines)
        string(REGEX MATCH "^([A-Z0-9_]+)=(.*)$" matched "${line}")
        set(${CMAKE_MATCH_1} "${CMAKE_MATCH_2}" PARENT_SCOPE)
    endforeach()
endfunction()

# The folder to build: the pinned archive in the build tree, or RKV_LLAMA_CPP_SOURCE.
function(rkv_prepare_source result)
    set(tool "${CMAKE_CURRENT_SOURCE_DIR}/cmake/rkv_source.py")
    file(GLOB patches CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/patches/*.patch")
    set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${patches} "${tool}")

    if (RKV_LLAMA_CPP_SOURCE)
        get_filename_component(tree "${RKV_LLAMA_CPP_SOURCE}" ABSOLUTE)
        set(arguments --local "${tree}")
    else()
        set(tree "${CMAKE_CURRENT_BINARY_DIR}/llama.cpp")
        set(arguments "${tree}")
    endif()

    if (NOT RKV_LLAMA_CPP_SOURCE OR RKV_APPLY_PATCHES)
        find_package(Python 3.10 REQUIRED COMPONENTS Interpreter)
        execute_process(
            COMMAND "${Python_EXECUTABLE}" "${tool}" prepare ${arguments}
            RESULT_VARIABLE status ERROR_VARIABLE errors)
        if (NOT status EQUAL 0)
            string(STRIP "${errors}" errors)
            string(REPLACE "\n" "\n " errors "${errors}")
            rkv_fail("${errors}")
        endif()
    endif()
    set(${result} "${tree}" PARENT_SCOPE)
endfunction()

# Every shared library and loadable backend below a folder, whatever backends are switched on.
function(rkv_collect_libraries folder result)
    get_property(targets DIRECTORY "${folder}" PROPERTY BUILDSYSTEM_TARGETS)
    set(found)
    foreach (target IN LISTS targets)
        get_target_property(type ${target} TYPE)
        if (type MATCHES "^(SHARED|MODULE)_LIBRARY$")
            list(APPEND found ${target})
        endif()
    endforeach()
    get_property(folders DIRECTORY "${folder}" PROPERTY SUBDIRECTORIES)
    foreach (sub IN LISTS folders)
        rkv_collect_libraries("${sub}" below)
        list(APPEND found ${below})
    endforeach()
    set(${result} ${found} PARENT_SCOPE)
endfunction()

# native/sources.cmake's files into a llama.cpp target, with our warnings on.
function(rkv_add_sources target)
    set(sources)
    foreach (source IN LISTS ARGN)
        list(APPEND sources "${RKV_NATIVE_DIR}/${source}")
    endforeach()
    if (NOT sources)
        return()
    endif()
    target_sources(${target} PRIVATE ${sources})
    set_property(SOURCE ${sources} TARGET_DIRECTORY ${target} PROPERTY SKIP_UNITY_BUILD_INCLUSION ON)
    set_property(SOURCE ${sources} TARGET_DIRECTORY ${target} APPEND PROPERTY COMPILE_DEFINITIONS
        "RKV_LLAMA_CPP_PYTHON_VERSION=\"${LLAMA_CPP_PYTHON_VERSION}\""
        "RKV_LLAMA_CPP_COMMIT=\"${LLAMA_CPP_COMMIT}\"")
    if (NOT MSVC)
        set_property(SOURCE ${sources} TARGET_DIRECTORY ${target} APPEND PROPERTY COMPILE_OPTIONS -Wall -Wextra)
    endif()
endfunction()

function(rkv_add_native tree)
    foreach (target IN LISTS ARGN)
        if (target MATCHES "^(llama|ggml-base|ggml-cpu.*)$")
            target_include_directories(${target} PRIVATE "${RKV_NATIVE_DIR}" "${RKV_NATIVE_DIR}/cpu"
                "${tree}/ggml/src" "${tree}/ggml/src/ggml-cpu")
        endif()
        if (target MATCHES "^ggml-cpu")
            rkv_add_sources(${target} ${RKV_GGML_CPU_SOURCES})
        endif()
    endforeach()
    target_include_directories(llama PRIVATE "${tree}/src")
    rkv_add_sources(llama ${RKV_LLAMA_SOURCES})
endfunction()

# native/tests/test-NAME.cpp -> a program and a CTest entry each; `cmake --build BUILD --target rkv-tests`.
function(rkv_add_native_tests tree)
    file(GLOB sources CONFIGURE_DEPENDS "${RKV_NATIVE_DIR}/tests/test-*.cpp")
    add_custom_target(rkv-tests)

    # the cases that every backend is held to
    add_library(rkv-cases STATIC EXCLUDE_FROM_ALL "${RKV_NATIVE_DIR}/tests/rkv-cases.cpp")
    target_compile_features(rkv-cases PUBLIC cxx_std_17)
    target_include_directories(rkv-cases PUBLIC "${RKV_NATIVE_DIR}" "${RKV_NATIVE_DIR}/tests")
    target_link_libraries(rkv-cases PUBLIC llama ggml)
    if (NOT MSVC)
        target_compile_options(rkv-cases PRIVATE -Wall -Wextra)
    endif()

    foreach (source IN LISTS sources)
        get_filename_component(name "${source}" NAME_WE)
        add_executable(${name} EXCLUDE_FROM_ALL "${source}")
        target_compile_features(${name} PRIVATE cxx_std_17)
        target_include_directories(${name} PRIVATE "${RKV_NATIVE_DIR}" "${RKV_NATIVE_DIR}/cpu"
            "${tree}/src" "${tree}/ggml/src" "${tree}/ggml/src/ggml-cpu")
        target_link_libraries(${name} PRIVATE rkv-cases llama ggml)
        if (NOT MSVC)
            target_compile_options(${name} PRIVATE -Wall -Wextra)
        endif()
        add_test(NAME ${name} COMMAND ${name})
        add_dependencies(rkv-tests ${name})
    endforeach()
endfunction()
