#pragma once

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "kernels/error.h"

namespace quantmill::testing {

// `action` must throw exactly that kind of error, with a message that holds every one of `parts`.
template <class ErrorType, class Action>
void expect_error(Action&& action, const std::vector<std::string>& parts) {
    try {
        action();
        ADD_FAILURE() << "nothing was thrown";
    } catch (const ErrorType& error) {
        for (const std::string& part : parts) {
            EXPECT_NE(std::string(error.what()).find(part), std::string::npos)
                << "'" << part << "' is not in: " << error.what();
        }
    } catch (const std::exception& error) {
        ADD_FAILURE() << "another error was thrown: " << error.what();
    }
}

}  // namespace quantmill::testing
