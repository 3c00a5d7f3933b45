# What all our targets are compiled with: link quantmill_options.
add_library(quantmill_options INTERFACE)
target_include_directories(quantmill_options INTERFACE ${PROJECT_SOURCE_DIR})
# Pedantic only for what the C++ compiler sees: nvcc's generated host code is not.
target_compile_options(quantmill_options INTERFACE
    $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wpedantic>)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
    # GCC bug 105329: std::string assignments are reported as overlapping copies.
    target_compile_options(quantmill_options INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Wno-restrict>)
endif()
if(QUANTMILL_WARNINGS_AS_ERRORS)
    target_compile_options(quantmill_options INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Werror>)
endif()
if(QUANTMILL_SANITIZE)
    target_compile_options(quantmill_options INTERFACE
        $<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${QUANTMILL_SANITIZE} -fno-sanitize-recover=all
                                  -fno-omit-frame-pointer>)
    if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
        # GCC bug 105562: with sanitizers it takes std::regex's own members for uninitialized.
        target_compile_options(quantmill_options INTERFACE
            $<$<COMPILE_LANGUAGE:CXX>:-Wno-maybe-uninitialized>)
    endif()
    target_link_options(quantmill_options INTERFACE -fsanitize=${QUANTMILL_SANITIZE})
endif()
