#pragma once

#include <map>
#include <string>

namespace quantmill {

// "0.1.0"
std::string version_number();

// "0.1.0 (commit 1a2b3c)": what a report, a checkpoint's metadata and a log name.
std::string short_version();

// The libraries whose versions decide the output's bytes, by name.
std::map<std::string, std::string> library_versions();

// What `quantmill --version` prints, a line each: version and commit, compilers, built backends and the
// libraries MPI, BLAS and HDF5.
std::string version_text();

}  // namespace quantmill
