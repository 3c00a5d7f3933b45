// Holds the reader against the seed corpus of the fuzzer: every file gets the verdict of its folder.
#include <gtest/gtest.h>

#include "kernels/error.h"
#include "tests/fuzz/read_header.h"
#include "tests/pipeline/temporary_directory.h"

namespace quantmill {
namespace {

namespace fs = std::filesystem;

std::vector<fs::path> corpus(const std::string& folder) {
    std::vector<fs::path> paths;
    for (const auto& entry : fs::directory_iterator(fs::path(QUANTMILL_CORPUS) / folder)) {
        paths.push_back(entry.path());
    }
    return paths;
}

SafetensorsHeader read(const fs::path& path) {
    const std::string bytes = testing::contents(path);
    return testing::read_header_of(reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size());
}

void expect_all_refused(const std::string& folder, std::size_t at_least) {
    const std::vector<fs::path> paths = corpus(folder);
    EXPECT_GE(paths.size(), at_least);
    for (const fs::path& path : paths) {
        SCOPED_TRACE(path.filename());
        EXPECT_THROW(read(path), BadInput);
    }
}

TEST(Corpus, ValidFilesAreAccepted) {
    const std::vector<fs::path> paths = corpus("valid");
    EXPECT_GE(paths.size(), 25U);
    for (const fs::path& path : paths) {
        SCOPED_TRACE(path.filename());
        EXPECT_NO_THROW(read(path));
    }
}

TEST(Corpus, MalformedFilesAreRefused) { expect_all_refused("malformed", 100); }

TEST(Corpus, WhatOnlyWeRefuse) { expect_all_refused("stricter", 5); }

}  // namespace
}  // namespace quantmill
