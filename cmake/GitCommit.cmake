# cmake -D SOURCE=… -D HEADER=… -P GitCommit.cmake: writes HEADER with the commit of SOURCE.
find_package(Git QUIET)
set(commit "unknown")
if(Git_FOUND)
    execute_process(COMMAND ${GIT_EXECUTABLE} describe --always --dirty --abbrev=12
                    WORKING_DIRECTORY ${SOURCE}
                    OUTPUT_VARIABLE described ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE
                    RESULT_VARIABLE status)
    if(status EQUAL 0)
        set(commit ${described})
    endif()
endif()
set(text "#pragma once\n#define QUANTMILL_COMMIT \"${commit}\"\n")
if(EXISTS ${HEADER})
    file(READ ${HEADER} old)
endif()
if(NOT text STREQUAL "${old}")
    file(WRITE ${HEADER} "${text}")
endif()
