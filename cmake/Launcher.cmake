# Which MPI this is, and how its launcher starts test ranks on a small machine.

# Sets QUANTMILL_MPI_LIBRARY ("Open MPI v4.1.4 (MPI 3.1)"), QUANTMILL_MPIEXEC_FLAGS and _TEXT.
macro(quantmill_describe_mpi)
    string(REGEX MATCH "[^,\n]+" QUANTMILL_MPI_LIBRARY "${MPI_CXX_LIBRARY_VERSION_STRING}")
    string(REGEX REPLACE "[ \t]+" " " QUANTMILL_MPI_LIBRARY
           "${QUANTMILL_MPI_LIBRARY} (MPI ${MPI_CXX_VERSION})")
    set(QUANTMILL_MPIEXEC_FLAGS "")
    if(MPIEXEC_EXECUTABLE)
        execute_process(COMMAND ${MPIEXEC_EXECUTABLE} --version
                        OUTPUT_VARIABLE launcher_version ERROR_VARIABLE launcher_version)
        if(launcher_version MATCHES "Open MPI|OpenRTE|PRRTE")
            # Its defaults bind one process to one core and refuse more ranks than cores.
            set(QUANTMILL_MPIEXEC_FLAGS --bind-to none --oversubscribe)
            set(launcher_family "Open MPI")
        elseif(launcher_version MATCHES "HYDRA")
            set(launcher_family "MPICH")
        endif()
    endif()
    if(launcher_family AND MPI_CXX_LIBRARY_VERSION_STRING MATCHES "^(Open MPI|MPICH)"
       AND NOT CMAKE_MATCH_1 STREQUAL launcher_family)
        message(WARNING "${MPIEXEC_EXECUTABLE} is ${launcher_family}'s, but the library is "
                        "${QUANTMILL_MPI_LIBRARY}: ranks would start as lone processes. "
                        "Set MPIEXEC_EXECUTABLE to that library's own launcher.")
    endif()
    list(JOIN QUANTMILL_MPIEXEC_FLAGS " " QUANTMILL_MPIEXEC_FLAGS_TEXT)
endmacro()
