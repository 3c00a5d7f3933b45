#include "pipeline/hessian_store.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "kernels/error.h"
#include "pipeline/files.h"
#include "pipeline/hdf5_handle.h"

namespace quantmill {
namespace {

namespace fs = std::filesystem;

constexpr int kVersion = 1;
constexpr hsize_t kChunk = hsize_t{1} << 20U;  // elements under one checksum

[[noreturn]] void fail(const fs::path& file, const std::string& what) {
    throw BadInput("Hessian store {}: {}", file.string(), what);
}

// Every status of HDF5 passes here. Writing fails for reasons of the machine, reading for those of the file.
template <class Status>
Status written(Status status, const fs::path& file, const char* what) {
    if (status < 0) {
        throw InfrastructureError("cannot write {}: {}: HDF5 says: {}", file.string(), what, hdf5_reason());
    }
    return status;
}

template <class Status>
Status readable(Status status, const fs::path& file, const std::string& what) {
    if (status < 0) {
        fail(file, fmt::format("{} cannot be read (HDF5: {}): the file is broken or was not written to its "
                               "end; make it again with calibration.save_hessians",
                               what, hdf5_reason()));
    }
    return status;
}

nlohmann::json to_json(const HessianOrigin& origin, const ModelGraph& graph) {
    return {{"version", kVersion},     {"model_name", origin.model_name}, {"model", origin.model},
            {"tokens", origin.tokens}, {"sequences", origin.sequences},   {"token_count", origin.token_count},
            {"blocks", graph.blocks}};
}

// Why Hessians of one origin must not serve for another; empty when they may.
std::string difference(const nlohmann::json& stored, const nlohmann::json& wanted) {
    const auto differs = [&](const char* key) {
        return stored.value(key, nlohmann::json()) != wanted.at(key);
    };
    if (differs("version"))
        return fmt::format("its version is {}, not {}", stored.value("version", 0), kVersion);
    std::vector<std::string> parts;
    if (differs("model") || differs("blocks")) {
        parts.push_back(
            fmt::format("it is of another model: {} (weights {:.12}), the job's is {} (weights {:.12})",
                        stored.value("model_name", "unknown"), stored.value("model", "unknown"),
                        wanted.value("model_name", ""), wanted.value("model", "")));
    }
    if (differs("tokens")) {
        parts.push_back(fmt::format(
            "it is of other calibration tokens: {} sequences with {} tokens ({:.12}), the job's are {} with "
            "{} "
            "({:.12})",
            stored.value("sequences", 0), stored.value("token_count", 0), stored.value("tokens", "unknown"),
            wanted.value("sequences", 0), wanted.value("token_count", 0), wanted.value("tokens", "")));
    }
    return fmt::format("{}", fmt::join(parts, "; "));
}

void write_array(hid_t group, const char* name, hid_t stored, hid_t native, const void* data, hsize_t count,
                 const fs::path& file) {
    const Handle space(written(H5Screate_simple(1, &count, nullptr), file, name), H5Sclose);
    const Handle properties(written(H5Pcreate(H5P_DATASET_CREATE), file, name), H5Pclose);
    const hsize_t chunk = std::min(kChunk, count);
    written(H5Pset_chunk(properties.get(), 1, &chunk), file, name);
    written(H5Pset_fletcher32(properties.get()), file, name);
    const Handle set(
        written(H5Dcreate2(group, name, stored, space.get(), H5P_DEFAULT, properties.get(), H5P_DEFAULT),
                file, name),
        H5Dclose);
    written(H5Dwrite(set.get(), native, H5S_ALL, H5S_ALL, H5P_DEFAULT, data), file, name);
}

void write_text_attribute(hid_t file_id, const char* name, const std::string& text, const fs::path& file) {
    const Handle type(written(H5Tcopy(H5T_C_S1), file, name), H5Tclose);
    written(H5Tset_size(type.get(), text.size()), file, name);
    const Handle space(written(H5Screate(H5S_SCALAR), file, name), H5Sclose);
    const Handle attribute(
        written(H5Acreate2(file_id, name, type.get(), space.get(), H5P_DEFAULT, H5P_DEFAULT), file, name),
        H5Aclose);
    written(H5Awrite(attribute.get(), type.get(), text.data()), file, name);
}

Handle without_locks(const fs::path& file) {
    Handle access(readable(H5Pcreate(H5P_FILE_ACCESS), file, "it"), H5Pclose);
    // Cluster file systems without locks would refuse.
    readable(H5Pset_file_locking(access.get(), 0, 1), file, "it");
    return access;
}

Handle open_file(const fs::path& file) {
    const InputFile exists(file);  // says plainly when it is missing or must not be read
    const Handle access = without_locks(file);
    return {readable(H5Fopen(file.c_str(), H5F_ACC_RDONLY, access.get()), file, "it"), H5Fclose};
}

std::string read_text_attribute(hid_t file_id, const char* name, const fs::path& file) {
    if (H5Aexists(file_id, name) <= 0) fail(file, fmt::format("it has no attribute {}", name));
    const Handle attribute(readable(H5Aopen(file_id, name, H5P_DEFAULT), file, name), H5Aclose);
    const Handle type(readable(H5Aget_type(attribute.get()), file, name), H5Tclose);
    if (H5Tget_class(type.get()) != H5T_STRING || H5Tis_variable_str(type.get()) != 0) {
        fail(file, fmt::format("attribute {} is not a text", name));
    }
    std::string text(H5Tget_size(type.get()), '\0');
    readable(H5Aread(attribute.get(), type.get(), text.data()), file, name);
    return text;
}

template <class T>
std::vector<T> read_array(hid_t file_id, const std::string& name, hid_t native, std::int64_t count,
                          const fs::path& file) {
    const Handle set(readable(H5Dopen2(file_id, name.c_str(), H5P_DEFAULT), file, name), H5Dclose);
    const Handle space(readable(H5Dget_space(set.get()), file, name), H5Sclose);
    const hssize_t found = readable(H5Sget_simple_extent_npoints(space.get()), file, name);
    if (found != count) fail(file, fmt::format("{} holds {} numbers, not {}", name, found, count));
    std::vector<T> values(static_cast<std::size_t>(count));
    readable(H5Dread(set.get(), native, H5S_ALL, H5S_ALL, H5P_DEFAULT, values.data()), file, name);
    return values;
}

}  // namespace

HessianStore::HessianStore(fs::path directory, const ModelGraph& graph, HessianOrigin origin, bool head)
    : directory_(std::move(directory)),
      graph_(graph),
      origin_(std::move(origin)),
      blocks_(graph.blocks + (head ? 1 : 0)) {}

fs::path HessianStore::file_of(int block) const { return directory_ / fmt::format("block-{:05}.h5", block); }

void HessianStore::require_no_other() const {
    for (int block = 0; block < blocks_; ++block) {
        std::error_code ignored;
        if (fs::exists(file_of(block), ignored)) require_origin(block);
    }
}

void HessianStore::prepare() const {
    require_no_other();
    std::error_code error;
    fs::create_directories(directory_, error);
    if (error) throw BadInput("calibration.save_hessians: {}: {}", directory_.string(), error.message());
}

std::uint64_t HessianStore::bytes() const {
    std::uint64_t block = 0;
    for (const Stage& stage : graph_.stages) {
        const auto n = static_cast<std::uint64_t>(stage.group.columns());
        block += n * (n + 1) / 2 * sizeof(std::int64_t) + n * sizeof(std::int32_t);
    }
    const auto width = static_cast<std::uint64_t>(blocks_ > graph_.blocks ? graph_.hidden_size : 0);
    const std::uint64_t head = width * (width + 1) / 2 * sizeof(std::int64_t) + width * sizeof(std::int32_t);
    return block * static_cast<std::uint64_t>(graph_.blocks) + head;
}

void HessianStore::write_block(int block, const std::vector<StoredHessian>& stages) const {
    const QuietErrors quiet;
    const fs::path path = file_of(block);
    fs::path partial = path;
    partial += ".partial";
    {
        const Handle access = without_locks(partial);
        // The formats of metadata since HDF5 1.10 have checksums too: a flipped bit in a type or an index is
        // found.
        written(H5Pset_libver_bounds(access.get(), H5F_LIBVER_V110, H5F_LIBVER_V110), path, "its format");
        const Handle file(written(H5Fcreate(partial.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, access.get()), path,
                                  "creating it"),
                          H5Fclose);
        write_text_attribute(file.get(), "origin", to_json(origin_, graph_).dump(), path);
        for (std::size_t stage = 0; stage < stages.size(); ++stage) {
            const std::string& name = graph_.stages_of(block)[stage].group.name;
            const Handle group(
                written(H5Gcreate2(file.get(), name.c_str(), H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT), path,
                        "a group"),
                H5Gclose);
            write_array(group.get(), "exponents", H5T_STD_I32LE, H5T_NATIVE_INT32,
                        stages[stage].exponents.data(), stages[stage].exponents.size(), path);
            write_array(group.get(), "sum", H5T_STD_I64LE, H5T_NATIVE_INT64, stages[stage].sum.data(),
                        stages[stage].sum.size(), path);
        }
        written(H5Fflush(file.get(), H5F_SCOPE_GLOBAL), path, "flushing it");
    }
    publish_file(partial, path);
}

void HessianStore::require_origin(int block) const {
    const QuietErrors quiet;
    const fs::path path = file_of(block);
    const Handle file = open_file(path);
    const auto stored =
        nlohmann::json::parse(read_text_attribute(file.get(), "origin", path), nullptr, false);
    if (!stored.is_object()) fail(path, "attribute origin is not JSON");
    const std::string differs = difference(stored, to_json(origin_, graph_));
    if (!differs.empty()) fail(path, differs);
}

void HessianStore::require_complete() const {
    std::vector<std::string> missing;
    for (int block = 0; block < blocks_; ++block) {
        std::error_code ignored;
        if (fs::exists(file_of(block), ignored)) {
            require_origin(block);
        } else {
            missing.push_back(file_of(block).filename().string());
        }
    }
    if (missing.empty()) return;
    throw BadInput(
        "Hessian store {}: {} of {} blocks are missing, {} first: the job that made it did not end; run it "
        "again with calibration.save_hessians",
        directory_.string(), missing.size(), blocks_, missing.front());
}

StoredHessian HessianStore::read(int block, std::size_t stage) const {
    const QuietErrors quiet;
    const fs::path path = file_of(block);
    const Handle file = open_file(path);
    const LinearGroup& group = graph_.stages_of(block)[stage].group;
    const std::int64_t columns = group.columns();
    return {read_array<std::int32_t>(file.get(), group.name + "/exponents", H5T_NATIVE_INT32, columns, path),
            read_array<std::int64_t>(file.get(), group.name + "/sum", H5T_NATIVE_INT64,
                                     columns * (columns + 1) / 2, path)};
}

}  // namespace quantmill
