#include "pipeline/safetensors.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <bit>
#include <nlohmann/json.hpp>
#include <set>
#include <tuple>
#include <unordered_set>
#include <utility>

#include "kernels/error.h"

namespace quantmill {
namespace {

using nlohmann::json;

constexpr std::uint64_t kPrefix = 8;
constexpr std::uint64_t kLargestHeader = 100'000'000;
constexpr std::size_t kDeepestNesting = 127;  // the official reader's limit
constexpr std::string_view kMetadataKey = "__metadata__";

struct ElementType {
    std::string_view name;
    std::uint64_t bits;
};

constexpr std::array kElementTypes = std::to_array<ElementType>({
    {"BOOL", 8},    {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6},     {"U8", 8},          {"I8", 8},
    {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}, {"I16", 16},
    {"U16", 16},    {"F16", 16},    {"BF16", 16},   {"I32", 32},        {"U32", 32},        {"F32", 32},
    {"C64", 64},    {"F64", 64},    {"I64", 64},    {"U64", 64},
});

constexpr std::array kOurTypes = std::to_array<std::pair<std::string_view, DType>>({
    {"F64", DType::f64},
    {"F32", DType::f32},
    {"F16", DType::f16},
    {"BF16", DType::bf16},
    {"I64", DType::i64},
    {"I32", DType::i32},
    {"U8", DType::u8},
});

// A name or parser message for an error: a hostile header may hold a name of 100 MB.
std::string shortened(std::string_view text) {
    constexpr std::size_t kEnough = 200;
    std::string result;
    for (const char c : text.substr(0, kEnough)) {
        const auto byte = static_cast<unsigned char>(c);
        result += byte >= 0x20 && byte < 0x7F ? std::string(1, c) : fmt::format("\\x{:02x}", byte);
    }
    return text.size() <= kEnough ? result : result + "…";
}

// Bytes of a tensor; nothing when the product overflows 64 bits or its bits do not fill whole
// bytes.
std::optional<std::uint64_t> extent_of(const std::vector<std::int64_t>& shape, std::uint64_t bits) {
    std::uint64_t product = 1;
    for (const std::int64_t size : shape) {
        if (__builtin_mul_overflow(product, static_cast<std::uint64_t>(size), &product)) return {};
    }
    if (__builtin_mul_overflow(product, bits, &product) || product % 8 != 0) return {};
    return product / 8;
}

// Takes the parser's events and builds the tensor list straight away: a document tree of a hostile
// header would need dozens of times its size. Offsets are kept relative to the data until finish().
class HeaderHandler final : public nlohmann::json_sax<json> {
public:
    HeaderHandler(std::uint64_t data_size, const std::string& file) : data_size_(data_size), file_(file) {}

    bool null() override { return value({.kind = Kind::null}); }
    bool boolean(bool /*unused*/) override { return value({.kind = Kind::other}); }
    bool number_integer(std::int64_t /*unused*/) override { return value({.kind = Kind::other}); }
    bool number_unsigned(std::uint64_t number) override {
        return value({.kind = Kind::number, .number = number});
    }
    bool number_float(double /*unused*/, const std::string& /*unused*/) override {
        return value({.kind = Kind::other});
    }
    bool string(std::string& text) override { return value({.kind = Kind::text, .text = &text}); }
    bool binary(json::binary_t& /*unused*/) override { return value({.kind = Kind::other}); }

    bool start_object(std::size_t /*unused*/) override {
        keys_.emplace_back();
        return value({.kind = Kind::object});
    }
    bool end_object() override {
        keys_.pop_back();
        return close();
    }
    bool start_array(std::size_t /*unused*/) override { return value({.kind = Kind::array}); }
    bool end_array() override { return close(); }
    bool key(std::string& text) override;
    bool parse_error(std::size_t /*unused*/, const std::string& /*unused*/,
                     const json::exception& error) override {
        fail("its header is not valid JSON: {}", shortened(error.what()));
    }

    // The tensors in the order of their data, once the whole header was seen.
    SafetensorsHeader finish(std::uint64_t data_begin);

private:
    enum class Kind { null, number, text, object, array, other };
    struct Value {
        Kind kind;
        std::uint64_t number = 0;
        std::string* text = nullptr;
    };
    // What the innermost open object or array is.
    enum class Place { document, header, metadata, entry, entry_list, type_variant, shape, offsets, ignored };
    enum class Field : unsigned { dtype, shape, data_offsets, unknown };

    template <class... Args>
    [[noreturn]] void fail(fmt::format_string<Args...> format, Args&&... args) const {
        throw BadInput("{} is not a valid safetensors file: {}", file_,
                       fmt::format(format, std::forward<Args>(args)...));
    }
    std::string this_tensor() const { return fmt::format("tensor '{}'", shortened(tensor_.name)); }

    bool value(const Value& value);
    void header_value(const Value& value);
    void metadata_value(const Value& value);
    void entry_value(const Value& value);
    void set_dtype(const std::string& name);
    void shape_value(const Value& value);
    void offsets_value(const Value& value);
    bool close();
    void finish_entry();

    std::uint64_t data_size_;
    const std::string& file_;
    SafetensorsHeader header_;
    std::vector<Place> places_ = {Place::document};
    std::vector<std::unordered_set<std::string>> keys_;  // of the open objects
    std::string key_;                                    // last key of the header or its metadata
    StoredTensor tensor_;                                // the open entry
    std::uint64_t bits_ = 0;                             // of its elements
    Field field_ = Field::unknown;
    unsigned seen_ = 0;  // fields of the open entry, a bit each
    std::size_t offsets_seen_ = 0;
    std::uint64_t bytes_seen_ = 0;  // of all entries
};

bool HeaderHandler::key(std::string& text) {
    if (!keys_.back().insert(text).second) {
        fail("its header has the key '{}' twice in one object", shortened(text));
    }
    switch (places_.back()) {
        case Place::header:
        case Place::metadata: key_ = std::move(text); break;
        case Place::entry:
            field_ = text == "dtype"          ? Field::dtype
                     : text == "shape"        ? Field::shape
                     : text == "data_offsets" ? Field::data_offsets
                                              : Field::unknown;
            break;
        case Place::type_variant: set_dtype(text); break;
        default: break;
    }
    return true;
}

bool HeaderHandler::value(const Value& value) {
    const bool opens = value.kind == Kind::object || value.kind == Kind::array;
    const std::size_t depth = places_.size();
    switch (places_.back()) {
        case Place::document:
            if (value.kind != Kind::object) fail("its header is not a JSON object");
            places_.push_back(Place::header);
            break;
        case Place::header: header_value(value); break;
        case Place::metadata: metadata_value(value); break;
        case Place::entry:
        case Place::entry_list: entry_value(value); break;
        case Place::type_variant:
            if (value.kind != Kind::null) fail("{}: its dtype is not a string", this_tensor());
            break;
        case Place::shape: shape_value(value); break;
        case Place::offsets: offsets_value(value); break;
        case Place::ignored: break;
    }
    if (opens && places_.size() == depth) places_.push_back(Place::ignored);
    if (places_.size() > kDeepestNesting + 1) fail("its header is nested too deeply");
    return true;
}

void HeaderHandler::header_value(const Value& value) {
    if (key_ == kMetadataKey) {
        if (value.kind == Kind::null) return;
        if (value.kind != Kind::object) fail("__metadata__ is not an object of strings");
        places_.push_back(Place::metadata);
        return;
    }
    tensor_ = {};
    tensor_.name = std::move(key_);
    seen_ = 0;
    offsets_seen_ = 0;
    // The official reader also takes [dtype, shape, data_offsets].
    if (value.kind == Kind::object) {
        places_.push_back(Place::entry);
    } else if (value.kind == Kind::array) {
        places_.push_back(Place::entry_list);
    } else {
        fail("{} is not described by an object", this_tensor());
    }
}

void HeaderHandler::metadata_value(const Value& value) {
    if (value.kind != Kind::text) fail("__metadata__ '{}' is not a string", shortened(key_));
    header_.metadata.emplace(std::move(key_), std::move(*value.text));
}

void HeaderHandler::entry_value(const Value& value) {
    if (places_.back() == Place::entry_list) {
        field_ = static_cast<Field>(std::popcount(seen_));
        if (field_ == Field::unknown) fail("{} has more than three fields", this_tensor());
    }
    if (field_ != Field::unknown) seen_ |= 1U << static_cast<unsigned>(field_);
    switch (field_) {
        case Field::dtype:
            if (value.kind == Kind::object) {  // the official reader also takes {"F32": null}
                places_.push_back(Place::type_variant);
            } else if (value.kind == Kind::text) {
                set_dtype(*value.text);
            } else {
                fail("{}: its dtype is not a string", this_tensor());
            }
            break;
        case Field::shape:
            if (value.kind != Kind::array) fail("{}: its shape is not a list", this_tensor());
            places_.push_back(Place::shape);
            break;
        case Field::data_offsets:
            if (value.kind != Kind::array) fail("{}: its data_offsets are no list", this_tensor());
            places_.push_back(Place::offsets);
            break;
        case Field::unknown: break;
    }
}

void HeaderHandler::set_dtype(const std::string& name) {
    if (!tensor_.dtype.empty()) fail("{} has two dtypes", this_tensor());
    const auto bits = safetensors_bits(name);
    if (!bits) {
        fail("{}: dtype '{}' is unknown to the format", this_tensor(), shortened(name));
    }
    tensor_.dtype = name;
    bits_ = *bits;
}

void HeaderHandler::shape_value(const Value& value) {
    if (value.kind != Kind::number || !std::in_range<std::int64_t>(value.number)) {
        fail("{}: its shape holds something else than integers in [0, 2^63)", this_tensor());
    }
    tensor_.shape.push_back(static_cast<std::int64_t>(value.number));
}

void HeaderHandler::offsets_value(const Value& value) {
    if (value.kind != Kind::number) {
        fail("{}: its data_offsets hold something else than unsigned integers", this_tensor());
    }
    if (offsets_seen_ == 0) tensor_.begin = value.number;
    if (offsets_seen_ == 1) tensor_.end = value.number;
    ++offsets_seen_;
}

bool HeaderHandler::close() {
    const Place closed = places_.back();
    places_.pop_back();
    if (closed == Place::entry || closed == Place::entry_list) finish_entry();
    return true;
}

void HeaderHandler::finish_entry() {
    if (seen_ != 0b111U || offsets_seen_ != 2 || tensor_.dtype.empty()) {
        fail("{} needs a dtype, a shape and two data_offsets", this_tensor());
    }
    if (tensor_.end < tensor_.begin) {
        fail("{} ends at {}, before its begin at {}", this_tensor(), tensor_.end, tensor_.begin);
    }
    if (tensor_.end > data_size_) {
        fail("{} ends at byte {} of the data, which has {}: the file is truncated or damaged", this_tensor(),
             tensor_.end, data_size_);
    }
    const auto extent = extent_of(tensor_.shape, bits_);
    if (!extent || *extent != tensor_.bytes()) {
        fail("{}: {} of shape [{}] does not take the {} bytes of its data_offsets", this_tensor(),
             tensor_.dtype, shortened(fmt::format("{}", fmt::join(tensor_.shape, ", "))), tensor_.bytes());
    }
    // Entries that share bytes cannot all fit: known here, before millions of them are stored.
    bytes_seen_ += tensor_.bytes();
    if (bytes_seen_ > data_size_) fail("{} overlaps with another tensor", this_tensor());
    header_.tensors.push_back(std::move(tensor_));
}

SafetensorsHeader HeaderHandler::finish(std::uint64_t data_begin) {
    auto& tensors = header_.tensors;
    std::sort(tensors.begin(), tensors.end(), [](const StoredTensor& a, const StoredTensor& b) {
        return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
    });
    std::uint64_t expected = 0;
    for (StoredTensor& tensor : tensors) {
        if (tensor.begin != expected) {
            fail("tensor '{}' begins at byte {} of the data, but the one before it ends at {}",
                 shortened(tensor.name), tensor.begin, expected);
        }
        expected = tensor.end;
        tensor.begin += data_begin;
        tensor.end += data_begin;
    }
    if (expected != data_size_) {
        fail("its tensors end at byte {} of the data, which has {}", expected, data_size_);
    }
    header_.data_begin = data_begin;
    return std::move(header_);
}

std::string entry_json(const StoredTensor& tensor) {
    return fmt::format(R"({}:{{"dtype":"{}","shape":[{}],"data_offsets":[{},{}]}})", json(tensor.name).dump(),
                       tensor.dtype, fmt::join(tensor.shape, ","), tensor.begin, tensor.end);
}

// Sets begin and end, relative to the data.
void lay_out(std::vector<StoredTensor>& tensors) {
    std::set<std::string_view> names = {kMetadataKey};
    std::uint64_t offset = 0;
    for (StoredTensor& tensor : tensors) {
        if (!names.insert(tensor.name).second) {
            throw InternalError("a safetensors file cannot hold two tensors '{}'", tensor.name);
        }
        const auto bits = safetensors_bits(tensor.dtype);
        const auto extent = bits ? extent_of(tensor.shape, *bits) : std::nullopt;
        if (!extent) {
            throw InternalError("tensor '{}': no size for {} of shape [{}]", tensor.name, tensor.dtype,
                                fmt::join(tensor.shape, ", "));
        }
        tensor.begin = offset;
        offset += *extent;
        tensor.end = offset;
    }
}

}  // namespace

std::int64_t StoredTensor::count() const {
    // Unsigned: a validated empty tensor may still pass through 2^63 on its way to 0.
    std::uint64_t product = 1;
    for (const std::int64_t size : shape) product *= static_cast<std::uint64_t>(size);
    return static_cast<std::int64_t>(product);
}

std::optional<DType> dtype_from_safetensors(std::string_view name) {
    for (const auto& [stored, dtype] : kOurTypes) {
        if (stored == name) return dtype;
    }
    return std::nullopt;
}

std::string_view safetensors_name(DType dtype) {
    for (const auto& [stored, ours] : kOurTypes) {
        if (ours == dtype) return stored;
    }
    throw InternalError("dtype {} has no name in safetensors", name_of(dtype));
}

std::optional<std::uint64_t> safetensors_bits(std::string_view dtype) {
    for (const ElementType& type : kElementTypes) {
        if (type.name == dtype) return type.bits;
    }
    return std::nullopt;
}

SafetensorsHeader parse_safetensors_header(std::string_view text, std::uint64_t file_size,
                                           const std::string& file) {
    const std::uint64_t data_begin = kPrefix + text.size();
    if (text.size() > kLargestHeader || data_begin > file_size) {
        throw BadInput("{} is not a valid safetensors file: a header of {} bytes in {} bytes", file,
                       text.size(), file_size);
    }
    // The JSON library takes a zero byte for the end and skips a byte order mark.
    if (text.find('\0') != std::string_view::npos || text.starts_with("\xEF\xBB\xBF")) {
        throw BadInput("{} is not a valid safetensors file: its header holds more than JSON", file);
    }
    HeaderHandler handler(file_size - data_begin, file);
    json::sax_parse(text, &handler);  // every error is thrown
    return handler.finish(data_begin);
}

SafetensorsHeader read_safetensors_header(const InputFile& file) {
    const std::string name = file.path().string();
    if (file.size() < kPrefix) {
        throw BadInput("{} is not a valid safetensors file: {} bytes cannot hold a header", name,
                       file.size());
    }
    std::array<unsigned char, kPrefix> prefix{};
    file.read(0, prefix.data(), prefix.size());
    std::uint64_t length = 0;
    for (std::size_t i = 0; i < kPrefix; ++i) length |= std::uint64_t{prefix.at(i)} << (8 * i);
    // Before any memory is asked for.
    if (length > kLargestHeader) {
        throw BadInput("{} is not a valid safetensors file: a header of {} bytes, at most {} allowed", name,
                       length, kLargestHeader);
    }
    if (length > file.size() - kPrefix) {
        throw BadInput("{} is truncated: its header should have {} bytes, {} are there", name, length,
                       file.size() - kPrefix);
    }
    std::string text(length, '\0');
    file.read(kPrefix, text.data(), text.size());
    return parse_safetensors_header(text, file.size(), name);
}

std::string make_safetensors_header(std::vector<StoredTensor>& tensors,
                                    const std::map<std::string, std::string>& metadata) {
    lay_out(tensors);
    std::string text = "{";
    if (!metadata.empty()) text += fmt::format("\"{}\":{}", kMetadataKey, json(metadata).dump());
    for (const StoredTensor& tensor : tensors) {
        if (text.size() > 1) text += ',';
        text += entry_json(tensor);
    }
    text += '}';
    text.resize((text.size() + 7) / 8 * 8, ' ');
    if (text.size() > kLargestHeader) {
        throw BadInput(
            "a safetensors header of {} tensors would have {} bytes, the format allows {}: lower "
            "output.max_shard_size",
            tensors.size(), text.size(), kLargestHeader);
    }
    std::string bytes;
    for (std::size_t i = 0; i < kPrefix; ++i) {
        bytes += static_cast<char>((text.size() >> (8 * i)) & 0xFFU);
    }
    bytes += text;
    for (StoredTensor& tensor : tensors) {
        tensor.begin += bytes.size();
        tensor.end += bytes.size();
    }
    return bytes;
}

}  // namespace quantmill
