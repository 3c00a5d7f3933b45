# quantmill_version: what `quantmill --version` says (workers/version.h).
add_library(quantmill_version STATIC ${PROJECT_SOURCE_DIR}/workers/version.cpp)
target_link_libraries(quantmill_version PUBLIC quantmill_options
                                        PRIVATE quantmill_kernels quantmill_comm)

# The commit is asked at every build, and the header is rewritten only when it changed.
set(header ${PROJECT_BINARY_DIR}/generated/quantmill_commit.h)
add_custom_target(quantmill_commit
    COMMAND ${CMAKE_COMMAND} -D SOURCE=${PROJECT_SOURCE_DIR} -D HEADER=${header}
            -P ${PROJECT_SOURCE_DIR}/cmake/GitCommit.cmake
    BYPRODUCTS ${header})
add_dependencies(quantmill_version quantmill_commit)

set(cuda_compiler none)
if(QUANTMILL_CUDA)
    set(cuda_compiler "${CMAKE_CUDA_COMPILER_ID} ${CMAKE_CUDA_COMPILER_VERSION}")
endif()
configure_file(${PROJECT_SOURCE_DIR}/workers/build.h.in
               ${PROJECT_BINARY_DIR}/generated/quantmill_build.h @ONLY)
target_include_directories(quantmill_version PRIVATE ${PROJECT_BINARY_DIR}/generated)
