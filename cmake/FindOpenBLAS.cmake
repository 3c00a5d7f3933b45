# OpenBLAS::OpenBLAS: cblas.h, the BLAS and its LAPACK. Any flavour (serial, pthread, openmp) will do.
# Sets OpenBLAS_FOUND, OpenBLAS_VERSION, OpenBLAS_LIBRARY and OpenBLAS_FLAVOUR.
find_package(PkgConfig QUIET)
if(PkgConfig_FOUND)
    pkg_check_modules(PC_OpenBLAS QUIET openblas)
endif()
find_path(OpenBLAS_INCLUDE_DIR cblas.h
    HINTS ${PC_OpenBLAS_INCLUDEDIR} ${PC_OpenBLAS_INCLUDE_DIRS}
    PATH_SUFFIXES openblas openblas-pthread openblas-serial openblas-openmp)
find_library(OpenBLAS_LIBRARY NAMES openblas openblasp openblaso
    HINTS ${PC_OpenBLAS_LIBDIR} ${PC_OpenBLAS_LIBRARY_DIRS})
mark_as_advanced(OpenBLAS_INCLUDE_DIR OpenBLAS_LIBRARY)

# Asks the library itself: its file name tells neither version nor flavour.
if(OpenBLAS_LIBRARY AND NOT DEFINED OpenBLAS_CONFIG)
    file(WRITE ${CMAKE_BINARY_DIR}/CMakeFiles/openblas_config.cpp
         "#include <cstdio>\n"
         "extern \"C\" { char* openblas_get_config(); int openblas_get_parallel(); void spotrf_(); }\n"
         "void (*volatile lapack)() = spotrf_;\n"
         "int main() { std::printf(\"%d %s\", openblas_get_parallel(), openblas_get_config());\n"
         "             return lapack == nullptr; }\n")
    try_run(OpenBLAS_RUNS OpenBLAS_LINKS ${CMAKE_BINARY_DIR}/CMakeFiles
            ${CMAKE_BINARY_DIR}/CMakeFiles/openblas_config.cpp
            LINK_LIBRARIES ${OpenBLAS_LIBRARY} RUN_OUTPUT_VARIABLE output)
    if(NOT OpenBLAS_LINKS)
        set(OpenBLAS_NOT_FOUND_MESSAGE "${OpenBLAS_LIBRARY} holds no LAPACK or is not OpenBLAS")
    elseif(OpenBLAS_RUNS EQUAL 0)
        set(OpenBLAS_CONFIG "${output}" CACHE INTERNAL "what openblas_get_config says")
    else()
        set(OpenBLAS_CONFIG "" CACHE INTERNAL "what openblas_get_config says")
    endif()
endif()
string(REGEX MATCH "OpenBLAS ([0-9.]+)" _ "${OpenBLAS_CONFIG}")
set(OpenBLAS_VERSION "${CMAKE_MATCH_1}")
string(REGEX MATCH "^[012]" OpenBLAS_PARALLEL "${OpenBLAS_CONFIG}")
set(OpenBLAS_FLAVOUR "unknown flavour")
foreach(flavour 0:serial 1:pthread 2:openmp)
    if(flavour MATCHES "^${OpenBLAS_PARALLEL}:(.*)" AND NOT OpenBLAS_PARALLEL STREQUAL "")
        set(OpenBLAS_FLAVOUR ${CMAKE_MATCH_1})
    endif()
endforeach()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(OpenBLAS
    REQUIRED_VARS OpenBLAS_LIBRARY OpenBLAS_INCLUDE_DIR
    REASON_FAILURE_MESSAGE "${OpenBLAS_NOT_FOUND_MESSAGE}")
if(DEFINED OpenBLAS_NOT_FOUND_MESSAGE)
    set(OpenBLAS_FOUND FALSE)
endif()
if(OpenBLAS_FOUND AND NOT TARGET OpenBLAS::OpenBLAS)
    add_library(OpenBLAS::OpenBLAS UNKNOWN IMPORTED)
    set_target_properties(OpenBLAS::OpenBLAS PROPERTIES
        IMPORTED_LOCATION ${OpenBLAS_LIBRARY}
        INTERFACE_INCLUDE_DIRECTORIES ${OpenBLAS_INCLUDE_DIR})
endif()
