# Finds every dependency and says in one line each what was found (version, place) or what the remedy is;
# all that is missing is named before the configuration fails.
include(Launcher)

# quantmill_found(name found details debian spack conda)
macro(quantmill_found name found details debian spack conda)
    if(${found})
        string(APPEND QUANTMILL_DEPENDENCIES "${name}: ${details}\n")
        message(STATUS "Found ${name}: ${details}")
    else()
        string(APPEND missing "\n  ${name}: apt-get install ${debian}  |  spack load ${spack}"
                              "  |  conda install -c conda-forge ${conda}")
        message(STATUS "MISSING ${name}: apt-get install ${debian}, or spack load ${spack}, "
                       "or conda install -c conda-forge ${conda}")
    endif()
endmacro()

set(CMAKE_FIND_PACKAGE_PREFER_CONFIG OFF)
set(THREADS_PREFER_PTHREAD_FLAG ON)
set(MPI_DETERMINE_LIBRARY_VERSION ON)
set(missing "")
set(QUANTMILL_DEPENDENCIES "")

find_package(OpenMP QUIET COMPONENTS CXX)
quantmill_found(OpenMP OpenMP_CXX_FOUND "${OpenMP_CXX_VERSION} (${OpenMP_CXX_FLAGS})"
                g++ gcc gxx)

find_package(MPI QUIET COMPONENTS CXX)
quantmill_describe_mpi()
quantmill_found(MPI MPI_CXX_FOUND "${QUANTMILL_MPI_LIBRARY}; launcher ${MPIEXEC_EXECUTABLE}"
                libopenmpi-dev openmpi openmpi)

find_package(OpenBLAS QUIET)
quantmill_found(OpenBLAS OpenBLAS_FOUND
                "${OpenBLAS_VERSION} (${OpenBLAS_FLAVOUR}), ${OpenBLAS_LIBRARY}"
                libopenblas-dev openblas libopenblas)

find_package(HDF5 QUIET COMPONENTS C)
quantmill_found(HDF5 HDF5_FOUND "${HDF5_VERSION}, ${HDF5_C_INCLUDE_DIRS}" libhdf5-dev hdf5 hdf5)

find_package(fmt QUIET)
quantmill_found(fmt fmt_FOUND "${fmt_VERSION}, ${fmt_DIR}" libfmt-dev fmt fmt)

find_package(spdlog QUIET)
quantmill_found(spdlog spdlog_FOUND "${spdlog_VERSION}, ${spdlog_DIR}" libspdlog-dev spdlog spdlog)

find_package(yaml-cpp QUIET)
quantmill_found(yaml-cpp yaml-cpp_FOUND "${yaml-cpp_VERSION}, ${yaml-cpp_DIR}"
                libyaml-cpp-dev yaml-cpp yaml-cpp)

find_package(nlohmann_json QUIET)
quantmill_found(nlohmann_json nlohmann_json_FOUND "${nlohmann_json_VERSION}, ${nlohmann_json_DIR}"
                nlohmann-json3-dev nlohmann-json nlohmann_json)

find_package(CLI11 QUIET)
quantmill_found(CLI11 CLI11_FOUND "${CLI11_VERSION}, ${CLI11_DIR}" libcli11-dev cli11 cli11)

find_package(OpenSSL QUIET COMPONENTS Crypto)
quantmill_found(OpenSSL OpenSSL_FOUND "${OPENSSL_VERSION}, ${OPENSSL_CRYPTO_LIBRARY}"
                libssl-dev openssl openssl)

if(QUANTMILL_TESTS)
    find_package(GTest QUIET)
    quantmill_found(GoogleTest GTest_FOUND "${GTest_VERSION}, ${GTest_DIR}"
                    libgtest-dev googletest "gtest (or -DQUANTMILL_TESTS=OFF)")
endif()

if(QUANTMILL_CUDA)
    find_package(CUDAToolkit QUIET)
    quantmill_found("CUDA toolkit" CUDAToolkit_FOUND "${CUDAToolkit_VERSION}, ${CUDAToolkit_BIN_DIR}"
                    nvidia-cuda-toolkit cuda "cuda-toolkit (or set CUDAToolkit_ROOT)")
    find_package(NCCL QUIET)
    quantmill_found(NCCL NCCL_FOUND "${NCCL_VERSION}, ${NCCL_LIBRARY}"
                    libnccl-dev nccl "nccl (or set NCCL_ROOT)")
endif()

if(missing)
    message(FATAL_ERROR "Dependencies are missing; install any of these (on a cluster: `module load` or "
                        "Spack), or add their places to CMAKE_PREFIX_PATH:${missing}\n"
                        "On Debian and Ubuntu tools/install_dependencies.sh installs all of them.")
endif()
