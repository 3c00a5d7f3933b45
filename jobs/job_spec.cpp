#include "jobs/job_spec.h"

#include <fmt/format.h>
#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <sstream>
#include <string_view>
#include <utility>

#include "jobs/foreign_keys.h"
#include "jobs/module_pattern.h"
#include "jobs/presets.h"
#include "jobs/text.h"
#include "kernels/error.h"

namespace quantmill {

namespace {

constexpr std::string_view minimal_job =
    "model: models/Meta-Llama-3-8B        # a Hugging Face checkpoint directory\n"
    "output:\n"
    "  directory: out/Meta-Llama-3-8B-W4g128\n"
    "calibration:\n"
    "  tokens: calib.h5                   # written by tools/calibrate.py\n";

// A scalar as the user wrote it, with all that a message about it needs.
struct Value {
    std::string where;  // "job.yaml:12" or "--set quantization.bits=5"
    std::string key;
    std::string text;
    bool quoted = false;
    std::string allowed;              // JobKey::values
    std::filesystem::path directory;  // of the job file

    [[noreturn]] void refuse(std::string_view reason) const {
        throw BadInput("{}: {}: {} {} ({})", where, key, quoted ? '"' + text + '"' : text, reason, allowed);
    }
};

// How a type of value is read and written; `values` says what is allowed.
template <class T>
struct Kind {
    std::string values;
    std::function<T(const Value&)> read;
    std::function<std::string(const T&)> write;
};

template <class Number>
Number read_number(const Value& value, std::string_view what) {
    Number number{};
    const char* end = value.text.data() + value.text.size();
    const auto [rest, error] = std::from_chars(value.text.data(), end, number);
    if (value.quoted) value.refuse("is text: write the number without quotes");
    if (error == std::errc::result_out_of_range) value.refuse("is not allowed");
    if (error != std::errc{} || rest != end) value.refuse(fmt::format("is not {}", what));
    return number;
}

// "." components and a trailing slash go, and ".." with what stands before it, unless that is a symbolic
// link: the file system would then go up from where the link leads.
std::filesystem::path tidy(const std::filesystem::path& path) {
    std::filesystem::path result;
    for (const auto& part : path) {
        std::error_code unreadable;
        if (part == ".." && !std::filesystem::is_symlink(result, unreadable))
            result = result.parent_path();
        else if (!part.empty() && part != ".")
            result /= part;
    }
    return result;
}

Kind<std::filesystem::path> path_kind() {
    const auto read = [](const Value& value) {
        if (value.text.starts_with('~'))
            value.refuse("starts with ~, which is not expanded: write the whole path");
        return tidy(std::filesystem::absolute(value.directory / value.text));
    };
    return {"path", read, [](const std::filesystem::path& path) { return path.string(); }};
}

// A path that need not be there: none is what stands for the empty one.
Kind<std::filesystem::path> optional_path_kind() {
    Kind<std::filesystem::path> kind = path_kind();
    kind.write = [](const std::filesystem::path& path) { return path.empty() ? "none" : path.string(); };
    kind.read = [read = kind.read](const Value& value) {
        return value.text == "none" && !value.quoted ? std::filesystem::path() : read(value);
    };
    kind.values = "path | none";
    return kind;
}

Kind<std::string> word_kind(std::vector<std::string> words) {
    const auto read = [words](const Value& value) {
        if (std::ranges::find(words, value.text) == words.end()) value.refuse("is not allowed");
        return value.text;
    };
    return {fmt::format("{}", fmt::join(words, " | ")), read, [](const std::string& word) { return word; }};
}

Kind<bool> bool_kind() {
    const auto read = [](const Value& value) {
        if (value.quoted || (value.text != "true" && value.text != "false")) value.refuse("is not allowed");
        return value.text == "true";
    };
    return {"true | false", read, [](bool flag) { return std::string(flag ? "true" : "false"); }};
}

template <class Integer>
Kind<Integer> one_of_kind(std::vector<Integer> numbers) {
    const auto read = [numbers](const Value& value) {
        const auto number = read_number<Integer>(value, "a whole number");
        if (std::ranges::find(numbers, number) == numbers.end()) value.refuse("is not allowed");
        return number;
    };
    return {fmt::format("{}", fmt::join(numbers, " | ")), read,
            [](Integer number) { return std::to_string(number); }};
}

// A value, or `word` for none.
template <class T>
Kind<std::optional<T>> or_word(const Kind<T>& kind, const std::string& word) {
    return {fmt::format("{} | {}", kind.values, word),
            [kind, word](const Value& value) -> std::optional<T> {
                if (value.text == word) return std::nullopt;
                return kind.read(value);
            },
            [kind, word](const std::optional<T>& found) { return found ? kind.write(*found) : word; }};
}

Kind<std::int64_t> count_kind() {
    const auto read = [](const Value& value) {
        const auto count = read_number<std::int64_t>(value, "a whole number");
        if (count < 1) value.refuse("is not allowed");
        return count;
    };
    return {"whole number >= 1", read, [](std::int64_t count) { return std::to_string(count); }};
}

Kind<double> fraction_kind() {
    const auto read = [](const Value& value) {
        const auto number = read_number<double>(value, "a number");
        if (!std::isfinite(number)) value.refuse("is not a finite number");
        if (number <= 0.0 || number >= 1.0) value.refuse("is not allowed");
        return number;
    };
    return {"number > 0 and < 1", read, [](double number) { return fmt::format("{}", number); }};
}

Kind<double> share_kind() {
    const auto read = [](const Value& value) {
        const auto number = read_number<double>(value, "a number");
        if (std::isnan(number) || number < 0.0 || number > 1.0) value.refuse("is not allowed");
        return number;
    };
    return {"number from 0 to 1", read, [](double number) { return fmt::format("{}", number); }};
}

Kind<double> bits_a_weight_kind() {
    const auto read = [](const Value& value) {
        const auto number = read_number<double>(value, "a number");
        if (std::isnan(number) || number < 2.0 || number > 9.0) value.refuse("is not allowed");
        return number;
    };
    return {"number from 2 to 9", read, [](double bits) { return fmt::format("{}", bits); }};
}

Kind<int> up_to_kind(int most) {
    const auto read = [most](const Value& value) {
        const auto number = read_number<int>(value, "a whole number");
        if (number < 0 || number > most) value.refuse("is not allowed");
        return number;
    };
    return {fmt::format("whole number from 0 to {}", most), read,
            [](int number) { return std::to_string(number); }};
}

struct Unit {
    std::string_view name;
    std::uint64_t bytes;
};
constexpr Unit units[] = {{"TB", 1'000'000'000'000},
                          {"GB", 1'000'000'000},
                          {"MB", 1'000'000},
                          {"kB", 1'000},
                          {"KB", 1'000},
                          {"TiB", 1ULL << 40},
                          {"GiB", 1ULL << 30},
                          {"MiB", 1ULL << 20},
                          {"KiB", 1ULL << 10},
                          {"kiB", 1ULL << 10},
                          {"B", 1},
                          {"", 1}};

std::uint64_t read_size(const Value& value) {
    const char* end = value.text.data() + value.text.size();
    double number = 0.0;
    const auto [rest, error] = std::from_chars(value.text.data(), end, number, std::chars_format::fixed);
    std::string_view name(rest, end);
    if (name.starts_with(' ')) name.remove_prefix(1);
    const auto unit = std::ranges::find(units, name, &Unit::name);
    if (error != std::errc{} || unit == std::end(units) || !std::isfinite(number))
        value.refuse("is not a size");
    const double bytes = number * static_cast<double>(unit->bytes);
    constexpr double largest = 1e15;  // a petabyte; doubles count single bytes up to 9e15
    if (bytes < 1000.0 || bytes > largest) value.refuse("is not allowed");
    return static_cast<std::uint64_t>(std::llround(bytes));
}

std::string write_size(std::uint64_t bytes) {
    const auto unit = std::ranges::find_if(units, [bytes](const Unit& u) { return bytes % u.bytes == 0; });
    return fmt::format("{}{}", bytes / unit->bytes, unit->name == "B" ? "" : unit->name);
}

Kind<std::uint64_t> size_kind() {
    return {"size such as 5GB, 500MB, 2GiB or bytes, >= 1kB", read_size, write_size};
}

// A size, or `word` for no limit.
Kind<std::optional<std::uint64_t>> size_or_kind(const std::string& word) {
    const auto read = [word](const Value& value) -> std::optional<std::uint64_t> {
        if (value.text == word) return std::nullopt;
        return read_size(value);
    };
    const auto write = [word](const std::optional<std::uint64_t>& bytes) {
        return bytes ? write_size(*bytes) : word;
    };
    return {fmt::format("{} | {}", size_kind().values, word), read, write};
}

struct TimeUnit {
    std::string_view name;
    double seconds;
};
constexpr TimeUnit time_units[] = {{"h", 3600.0}, {"min", 60.0}, {"s", 1.0}};

double read_duration(const Value& value) {
    const char* end = value.text.data() + value.text.size();
    double number = 0.0;
    const auto [rest, error] = std::from_chars(value.text.data(), end, number, std::chars_format::fixed);
    const auto unit = std::ranges::find(time_units, std::string_view(rest, end), &TimeUnit::name);
    if (error != std::errc{} || unit == std::end(time_units) || !std::isfinite(number))
        value.refuse("is not a duration");
    const double seconds = number * unit->seconds;
    if (seconds < 1.0 || seconds > 7 * 24 * 3600.0) value.refuse("is not allowed");
    return seconds;
}

std::string write_duration(double seconds) {
    const auto unit = std::ranges::find_if(
        time_units, [seconds](const TimeUnit& u) { return std::fmod(seconds, u.seconds) == 0.0; });
    if (unit == std::end(time_units)) return fmt::format("{}s", seconds);
    return fmt::format("{}{}", seconds / unit->seconds, unit->name);
}

Kind<double> duration_kind() {
    return {"duration such as 90s, 10min, 2h; 1s to 168h", read_duration, write_duration};
}

struct Row {
    JobKey key;
    std::function<void(JobSpec&, const Value&)> read;
    std::function<std::string(const JobSpec&)> write;
};

// `member` maps a JobSpec, const or not, to the member that holds the key.
template <class T, class Member>
Row row(std::string path, Kind<T> kind, std::string meaning, Member member) {
    const JobSpec defaults;
    return {{std::move(path), kind.values, kind.write(member(defaults)), std::move(meaning)},
            [kind, member](JobSpec& spec, const Value& value) { member(spec) = kind.read(value); },
            [kind, member](const JobSpec& spec) { return kind.write(member(spec)); }};
}

constexpr std::string_view preset_default = "the preset's";

// A key whose default is the preset's.
Row decided(Row row) {
    row.key.default_value = preset_default;
    return row;
}

Row required(Row row) {
    row.key.default_value = "required";
    return row;
}

constexpr std::string_view outputs_key = "outputs";
constexpr std::string_view overrides_key = "quantization.overrides";

// A list, which FileReader reads; here for help, manual and spelling.
Row list_row(std::string_view path, std::string values, std::string meaning) {
    const auto refuse = [](JobSpec&, const Value& value) {
        if (value.text != "none") value.refuse("is not allowed: a list is written in the job file");
    };
    return {{std::string(path), std::move(values), "none", std::move(meaning)}, refuse, [](const JobSpec&) {
                return std::string("none");
            }};
}

std::vector<Row> output_rows() {
    return {
        required(row("model", path_kind(), "Hugging Face checkpoint directory",
                     [](auto& s) -> auto& { return s.model; })),
        required(row("output.directory", path_kind(), "where the quantized checkpoint goes",
                     [](auto& s) -> auto& { return s.output.directory; })),
        row("output.format", word_kind({"gptq", "gptq_v2"}), "how zero points are stored",
            [](auto& s) -> auto& { return s.output.format; }),
        row("output.max_shard_size", size_kind(), "largest safetensors file",
            [](auto& s) -> auto& { return s.output.max_shard_size; }),
        row("output.serve.tensor_parallel", count_kind(), "GPUs that will share the model when it is served",
            [](auto& s) -> auto& { return s.output.tensor_parallel; }),
        row("output.allow_unservable", bool_kind(), "quantize although common servers cannot load the result",
            [](auto& s) -> auto& { return s.output.allow_unservable; }),
        list_row(outputs_key, "list of {directory, …, quantization}",
                 "several checkpoints instead of output, each with changes to quantization"),
    };
}

std::vector<Row> calibration_rows() {
    return {
        required(row("calibration.tokens", path_kind(),
                     "HDF5 store of token sequences, from tools/calibrate.py",
                     [](auto& s) -> auto& { return s.calibration.tokens; })),
        row("calibration.sequences", or_word(count_kind(), "all"), "use the first that many sequences",
            [](auto& s) -> auto& { return s.calibration.sequences; }),
        row("calibration.sequence_length", or_word(count_kind(), "store"),
            "cut longer sequences to this many tokens",
            [](auto& s) -> auto& { return s.calibration.sequence_length; }),
        row("calibration.allow_tokenizer_mismatch", bool_kind(), "accept a store made with another tokenizer",
            [](auto& s) -> auto& { return s.calibration.allow_tokenizer_mismatch; }),
        row("calibration.save_hessians", optional_path_kind(), "keep the Hessians in this directory",
            [](auto& s) -> auto& { return s.calibration.save_hessians; }),
        row("calibration.hessians", optional_path_kind(),
            "take the Hessians from this directory instead of running the model",
            [](auto& s) -> auto& { return s.calibration.hessians; }),
    };
}

const std::vector<int> allowed_bits{2, 3, 4, 8};
const std::vector<std::int64_t> allowed_group_sizes{-1, 16, 32, 64, 128, 256, 512, 1024};

std::vector<Row> quantization_rows() {
    return {
        row("quantization.bits", one_of_kind(allowed_bits), "bits a weight",
            [](auto& s) -> auto& { return s.quantization.bits; }),
        row("quantization.group_size", one_of_kind(allowed_group_sizes),
            "weights of a row that share one scale; -1: the whole row",
            [](auto& s) -> auto& { return s.quantization.group_size; }),
        row("quantization.sym", bool_kind(), "zero point in the middle of the range",
            [](auto& s) -> auto& { return s.quantization.sym; }),
        row("quantization.desc_act", bool_kind(), "columns with large activations first (act-order)",
            [](auto& s) -> auto& { return s.quantization.desc_act; }),
        row("quantization.damp_percent", or_word(fraction_kind(), "auto"),
            "damping, as a share of the Hessian's mean diagonal",
            [](auto& s) -> auto& { return s.quantization.damp_percent; }),
        row("quantization.damp_auto_increment", fraction_kind(),
            "added to the damping when a factorization fails",
            [](auto& s) -> auto& { return s.quantization.damp_auto_increment; }),
        row("quantization.true_sequential", bool_kind(),
            "later linears of a block see the error of earlier ones",
            [](auto& s) -> auto& { return s.quantization.true_sequential; }),
        row("quantization.propagate", word_kind({"quantized", "original"}),
            "what feeds a block's Hessians: the quantized blocks before it, or the original ones",
            [](auto& s) -> auto& { return s.quantization.propagate; }),
        row("quantization.preset", word_kind(preset_names()),
            "decides the keys below it that are not set themselves",
            [](auto& s) -> auto& { return s.quantization.preset; }),
        decided(row("quantization.act_group_aware", bool_kind(),
                    "columns with large activations first, inside groups; g_idx stays sorted (GAR)",
                    [](auto& s) -> auto& { return s.quantization.act_group_aware; })),
        decided(row("quantization.static_groups", bool_kind(),
                    "scales come from the original weights; with desc_act g_idx stays sorted",
                    [](auto& s) -> auto& { return s.quantization.static_groups; })),
        decided(row("quantization.scale_search", word_kind({"minmax", "mse", "hessian"}),
                    "how a group's scale is chosen",
                    [](auto& s) -> auto& { return s.quantization.scale_search; })),
        decided(row("quantization.signed_scales", bool_kind(),
                    "a scale may be negative, where that suits a group's larger extreme",
                    [](auto& s) -> auto& { return s.quantization.signed_scales; })),
        decided(row("quantization.scale_rounding", word_kind({"auto", "fp16", "bf16"}),
                    "what scales are rounded to before they are used",
                    [](auto& s) -> auto& { return s.quantization.scale_rounding; })),
        decided(row("quantization.refit", bool_kind(),
                    "fit the scales of a row anew when its codes are known",
                    [](auto& s) -> auto& { return s.quantization.refit; })),
        decided(row("quantization.sweeps", up_to_kind(8),
                    "passes that improve one code at a time after the solve",
                    [](auto& s) -> auto& { return s.quantization.sweeps; })),
        decided(row("quantization.error_propagation_alpha", share_kind(),
                    "how much of the error of earlier blocks a linear makes up for",
                    [](auto& s) -> auto& { return s.quantization.error_propagation_alpha; })),
        row("quantization.on_fallback", word_kind({"report", "error"}),
            "what happens when a linear cannot have GPTQ as it was asked for",
            [](auto& s) -> auto& { return s.quantization.on_fallback; }),
    };
}

// What makes linears differ from each other.
std::vector<Row> mixed_quantization_rows() {
    return {
        row("quantization.target_bits", or_word(bits_a_weight_kind(), "none"),
            "choose bits for each linear so that a weight takes that many on average, all overhead counted",
            [](auto& s) -> auto& { return s.quantization.target_bits; }),
        row("quantization.target_choices", word_kind({"2,3,4,8", "4,8"}),
            "bits that target_bits chooses among",
            [](auto& s) -> auto& { return s.quantization.target_choices; }),
        row("quantization.lm_head.bits", or_word(one_of_kind(allowed_bits), "none"),
            "quantize lm_head too, with that many bits a weight",
            [](auto& s) -> auto& { return s.quantization.lm_head_bits; }),
        row("quantization.lm_head.group_size", or_word(one_of_kind(allowed_group_sizes), "same"),
            "of lm_head; same: as quantization.group_size",
            [](auto& s) -> auto& { return s.quantization.lm_head_group_size; }),
        list_row(overrides_key, "list of {match, skip | bits, …}",
                 "rules for linears by name; the first that matches counts"),
    };
}

std::vector<Row> compute_rows() {
    return {
        row("compute.backend", word_kind({"auto", "cpu", "cuda"}), "what computes",
            [](auto& s) -> auto& { return s.compute.backend; }),
        row("compute.communicator", word_kind({"auto", "mpi", "nccl"}), "what carries tensors between ranks",
            [](auto& s) -> auto& { return s.compute.communicator; }),
        row("compute.device_memory", size_or_kind("free"), "most memory that a rank may take of its GPU",
            [](auto& s) -> auto& { return s.compute.device_memory; }),
        row("compute.activations", word_kind({"auto", "stream", "recompute"}),
            "what happens to activations that do not fit in memory",
            [](auto& s) -> auto& { return s.compute.activations; }),
        row("compute.layer_groups", or_word(count_kind(), "auto"), "groups that the ranks form",
            [](auto& s) -> auto& { return s.compute.layer_groups; }),
        row("compute.stall_timeout", duration_kind(),
            "a rank that gives no sign of life for so long ends the job",
            [](auto& s) -> auto& { return s.compute.stall_timeout; }),
    };
}

// The keys of the section quantization that a rule of overrides may set.
const std::vector<std::string> rule_keys{"bits",          "group_size",      "sym",
                                         "desc_act",      "damp_percent",    "damp_auto_increment",
                                         "static_groups", "act_group_aware", "scale_search",
                                         "signed_scales", "scale_rounding",  "refit",
                                         "sweeps"};

// Every key, in the order in which help and YAML show them.
const std::vector<Row>& rows() {
    static const std::vector<Row> table = [] {
        std::vector<Row> all;
        for (const auto& part : {output_rows(), calibration_rows(), quantization_rows(),
                                 mixed_quantization_rows(), compute_rows()})
            all.insert(all.end(), part.begin(), part.end());
        return all;
    }();
    return table;
}

const Row* find_row(const std::string& path) {
    const auto found = std::ranges::find(rows(), path, [](const Row& row) { return row.key.path; });
    return found == rows().end() ? nullptr : &*found;
}

std::string parent_of(const std::string& path) {
    const auto dot = path.rfind('.');
    return dot == std::string::npos ? "" : path.substr(0, dot);
}

std::string name_of(const std::string& path) { return path.substr(path.rfind('.') + 1); }

// "output", "output.serve", … : every proper prefix of a key.
const std::vector<std::string>& sections() {
    static const std::vector<std::string> table = [] {
        std::vector<std::string> names;
        for (const auto& row : rows())
            for (auto name = parent_of(row.key.path); !name.empty(); name = parent_of(name))
                if (std::ranges::find(names, name) == names.end()) names.push_back(name);
        return names;
    }();
    return table;
}

bool is_section(const std::string& path) { return std::ranges::find(sections(), path) != sections().end(); }

// Names that may stand directly below `section` ("" is the top).
std::vector<std::string> names_in(const std::string& section) {
    std::vector<std::string> names;
    const auto add = [&](const std::string& path) {
        const auto name = name_of(path);
        if (parent_of(path) == section && std::ranges::find(names, name) == names.end())
            names.push_back(name);
    };
    for (const auto& row : rows()) {
        add(row.key.path);
        if (const auto parent = parent_of(row.key.path); !parent.empty()) add(parent);
    }
    return names;
}

// The known key or section that was probably meant: alike in its last word, in the same section if possible.
std::optional<std::string> nearest_key(const std::string& path) {
    std::vector<std::string> known = sections();
    for (const auto& row : rows()) known.push_back(row.key.path);
    const auto cost = [&path](const std::string& candidate) {
        return std::pair(edit_distance(name_of(path), name_of(candidate)),
                         edit_distance(parent_of(path), parent_of(candidate)));
    };
    const auto nearest = std::ranges::min_element(known, {}, cost);
    if (!looks_like(name_of(path), name_of(*nearest))) return std::nullopt;
    return *nearest;
}

[[noreturn]] void refuse_unknown(const std::string& where, const std::string& path) {
    if (const auto advice = advice_for_foreign_key(path))
        throw BadInput("{}: {}: unknown key; {}", where, path, *advice);
    const auto nearest = nearest_key(path);
    const auto section = is_section(parent_of(path)) ? parent_of(path) : "";
    throw BadInput("{}: {}: unknown key; {}{} has {}", where, path,
                   nearest ? fmt::format("did you mean {}? ", *nearest) : "",
                   section.empty() ? "a job file" : section, list_text(names_in(section)));
}

// Remembers where each YAML document of a text begins, and nothing else.
class DocumentStarts : public YAML::EventHandler {
public:
    std::vector<YAML::Mark> marks;

    void OnDocumentStart(const YAML::Mark& mark) override { marks.push_back(mark); }
    void OnDocumentEnd() override {}
    void OnNull(const YAML::Mark&, YAML::anchor_t) override {}
    void OnAlias(const YAML::Mark&, YAML::anchor_t) override {}
    void OnScalar(const YAML::Mark&, const std::string&, YAML::anchor_t, const std::string&) override {}
    void OnSequenceStart(const YAML::Mark&, const std::string&, YAML::anchor_t,
                         YAML::EmitterStyle::value) override {}
    void OnSequenceEnd() override {}
    void OnMapStart(const YAML::Mark&, const std::string&, YAML::anchor_t,
                    YAML::EmitterStyle::value) override {}
    void OnMapEnd() override {}
};

// YAML::Load reads one document and is silent about what follows; YAML::LoadAll never returns when a
// document begins with a comma. Throws YAML::ParserException where a second document begins.
YAML::Node load_single_document(const std::string& text) {
    std::istringstream stream(text);
    YAML::Parser parser(stream);
    DocumentStarts starts;
    if (parser.HandleNextDocument(starts) && parser.HandleNextDocument(starts))
        throw YAML::ParserException(
            starts.marks.back(), "this does not belong to what stands before it, and a job is one document");
    return YAML::Load(text);
}

using Places = std::map<std::string, std::string>;

// What bits, format and symmetry must be to each other.
void require_grid(const JobSpec& spec, const Places& places) {
    if (spec.quantization.sym || spec.output.format != "gptq") return;
    const auto place =
        places.contains("quantization.sym") ? places.find("quantization.sym") : places.find("output.format");
    throw BadInput(
        "{}quantization.sym: false needs output.format: gptq_v2 (gptq stores zero points "
        "minus one, and an asymmetric zero point of 0 then garbles its neighbours in some "
        "readers)",
        place == places.end() ? "outputs: " : place->second + ": ");
}

// `set`: keys of the job, or of an item of outputs.
void require_one_of_bits(const JobSpec& spec, const Places& set) {
    if (!spec.quantization.target_bits) {
        const auto choices = set.find("quantization.target_choices");
        if (choices == set.end() || spec.quantization.target_choices == QuantizationSpec{}.target_choices)
            return;
        throw BadInput("{}: quantization.target_choices: needs quantization.target_bits", choices->second);
    }
    if (const auto bits = set.find("quantization.bits"); bits != set.end())
        throw BadInput("{}: quantization.bits: quantization.target_bits chooses bits: set one of them",
                       bits->second);
    for (const QuantizationRule& rule : spec.quantization.overrides) {
        if (rule.skip || std::ranges::find(rule.keys, "bits") != rule.keys.end()) continue;
        throw BadInput(
            "{}: quantization.overrides: match: {}: with quantization.target_bits a rule sets bits, or skip: "
            "true",
            rule.place, rule.match);
    }
}

void require_rule_grids(const JobSpec& spec) {
    for (const QuantizationRule& rule : spec.quantization.overrides) {
        if (rule.quantization.sym || spec.output.format != "gptq") continue;
        throw BadInput(
            "{}: quantization.overrides: sym: false needs output.format: gptq_v2, as quantization.sym does",
            rule.place);
    }
}

// Walks one job file: fills `spec`, remembers where each key stands.
class FileReader {
public:
    FileReader(JobSpec& spec, const std::filesystem::path& file) : spec_(spec), file_(file) {}

    void read(const std::string& text) {
        const YAML::Node root = parse(text);
        if (root.IsNull())
            throw BadInput("{}: is empty; a job needs at least\n\n{}", file_.string(), minimal_job);
        if (!root.IsMap())
            throw BadInput("{}: holds no keys; a job needs at least\n\n{}", where(root), minimal_job);
        read_section(root, "");
    }

    const std::map<std::string, std::string>& places() const { return places_; }

    // The items of `outputs`, each of which starts from the job as it is by now; `set`: keys that it sets.
    void read_outputs(const Places& set) {
        if (!outputs_.IsDefined()) return;
        if (!outputs_.IsSequence() || outputs_.size() == 0)
            throw BadInput("{}: outputs: must be a list, each item beginning with - directory: PATH",
                           places_.at(std::string(outputs_key)));
        const JobSpec base = spec_;
        for (const auto& item : outputs_) spec_.outputs.push_back(read_variant(base, item, set));
    }

    void forget_rules() { overrides_.reset(YAML::Node(YAML::NodeType::Undefined)); }
    // The rules of quantization.overrides, on top of `job`, whose other keys are complete; `set`: keys that
    // it sets.
    void read_rules(JobSpec& job, const Places& set) const {
        if (!overrides_.IsDefined()) return;
        if (!overrides_.IsSequence())
            throw BadInput(
                "{}: quantization.overrides: must be a list, each item beginning with - match: NAME",
                where(overrides_));
        std::vector<QuantizationRule> rules;
        for (const auto& item : overrides_) rules.push_back(read_rule(job, item, set));
        job.quantization.overrides = std::move(rules);
    }

private:
    QuantizationRule read_rule(JobSpec job, const YAML::Node& item, const Places& set) const {
        QuantizationRule rule;
        rule.place = where(item);
        if (!item.IsMap())
            throw BadInput("{}: quantization.overrides: a rule must hold keys: match, skip or {}", rule.place,
                           list_text(rule_keys));
        job.quantization.overrides.clear();
        FileReader reader(job, file_);
        for (const auto& entry : item) reader.read_rule_key(entry.first, entry.second, rule);
        if (rule.match.empty()) throw BadInput("{}: quantization.overrides: a rule has no match", rule.place);
        if (rule.skip == !rule.keys.empty())
            throw BadInput("{}: quantization.overrides: a rule has either skip: true, or keys to set: {}",
                           rule.place, list_text(rule_keys));
        apply_preset(job.quantization, [&](std::string_view key) {
            const auto path = fmt::format("quantization.{}", key);
            return reader.places_.contains(path) || set.contains(path);
        });
        if (const auto contradiction = contradiction_in(job.quantization); !contradiction.empty())
            throw BadInput("{}: quantization.overrides: {}", rule.place, contradiction);
        rule.quantization = std::move(job.quantization);
        return rule;
    }

    void read_rule_key(const YAML::Node& key, const YAML::Node& node, QuantizationRule& rule) {
        const auto place = where(key);
        if (!key.IsScalar()) throw BadInput("{}: a key must be a plain word", place);
        const std::string& name = key.Scalar();
        const auto path = fmt::format("quantization.{}", name);
        if (name == "match" || name == "skip") {
            if (!places_.emplace(path, place).second)
                throw BadInput("{}: quantization.overrides: {} is here a second time", place, name);
            if (!node.IsScalar() || node.Scalar().empty())
                throw BadInput("{}: quantization.overrides: {}: must be one value", place, name);
            if (name == "match") return read_match(node.Scalar(), place, rule);
            rule.skip = bool_kind().read({place, "quantization.overrides: skip", node.Scalar(),
                                          node.Tag() == "!", bool_kind().values, file_.parent_path()});
            return;
        }
        if (std::ranges::find(rule_keys, name) == rule_keys.end())
            throw BadInput("{}: quantization.overrides: {}: is not a key of a rule (match, skip, {})", place,
                           name, list_text(rule_keys));
        read_named(path, node, place);
        rule.keys.push_back(name);
    }

    static void read_match(const std::string& text, const std::string& place, QuantizationRule& rule) try {
        const ModulePattern pattern(text);
        rule.match = text;
    } catch (const std::regex_error& error) {
        throw BadInput("{}: quantization.overrides: match: {} is no {}: {}", place, text,
                       text.starts_with(kRegexPrefix) ? "regular expression" : "glob", error.what());
    }

    OutputVariant read_variant(JobSpec job, const YAML::Node& item, const Places& set) const {
        if (!item.IsMap())
            throw BadInput("{}: outputs: an item must hold keys: directory, {}, quantization", where(item),
                           list_text(names_in("output")));
        FileReader reader(job, file_);
        for (const auto& entry : item) {
            if (!entry.first.IsScalar()) throw BadInput("{}: a key must be a plain word", where(entry.first));
            const std::string& name = entry.first.Scalar();
            const auto path = name == "quantization" ? name : "output." + name;
            reader.read_named(path, entry.second, where(entry.first));
        }
        if (!reader.places_.contains("output.directory"))
            throw BadInput("{}: outputs: an item has no directory", where(item));
        if (const auto place = reader.places_.find("quantization.propagate"); place != reader.places_.end())
            throw BadInput("{}: quantization.propagate: is one for the whole job: move it out of outputs",
                           place->second);
        require_grid(job, reader.places_);
        // An item's own preset decides also what the job sets.
        const bool own = reader.places_.contains("quantization.preset");
        apply_preset(job.quantization, [&](std::string_view key) {
            const auto path = fmt::format("quantization.{}", key);
            return reader.places_.contains(path) || (!own && set.contains(path));
        });
        if (const auto contradiction = contradiction_in(job.quantization); !contradiction.empty())
            throw BadInput("{}: outputs: {}", where(item), contradiction);
        // Its own rules, or those of the job on top of what it changes.
        job.quantization.overrides.clear();
        if (!reader.places_.contains(std::string(overrides_key))) reader.overrides_.reset(overrides_);
        Places all = reader.places_;
        if (!own) all.insert(set.begin(), set.end());
        reader.read_rules(job, all);
        require_rule_grids(job);
        require_one_of_bits(job, reader.places_);
        return {job.output, job.quantization};
    }

    YAML::Node parse(const std::string& text) const try {
        return load_single_document(text);
    } catch (const YAML::Exception& error) {
        throw BadInput("{}:{}:{}: is not YAML: {}", file_.string(), error.mark.line + 1,
                       error.mark.column + 1, error.msg);
    }

    std::string where(const YAML::Node& node) const {
        return fmt::format("{}:{}", file_.string(), node.Mark().line + 1);
    }

    void read_section(const YAML::Node& map, const std::string& section) {
        // Iteration shows a key as often as the file has it; YAML::Node's own look-up would hide doubles.
        for (const auto& entry : map) {
            const auto place = where(entry.first);
            if (!entry.first.IsScalar()) throw BadInput("{}: a key must be a plain word", place);
            const std::string& name = entry.first.Scalar();
            const auto path = section.empty() ? name : section + '.' + name;
            if (name.find('.') != std::string::npos)
                throw BadInput(
                    "{}: {}: only --set joins names with dots; in a file write {}: and, below it "
                    "and indented, the rest",
                    place, path, path.substr(0, path.find('.')));
            read_named(path, entry.second, place);
        }
    }

    void read_named(const std::string& path, const YAML::Node& node, const std::string& place) {
        if (const auto [first, is_new] = places_.emplace(path, place); !is_new)
            throw BadInput("{}: {}: is here a second time; the first is at {}", place, path, first->second);
        read_entry(node, path, place);
    }

    void read_entry(const YAML::Node& node, const std::string& path, const std::string& place) {
        if (is_section(path)) {
            if (node.IsNull()) return;  // every key of it is commented out
            if (!node.IsMap())
                throw BadInput("{}: {}: must hold keys below it: {}", place, path, list_text(names_in(path)));
            return read_section(node, path);
        }
        if (path == outputs_key && !node.IsScalar()) {
            outputs_.reset(node);
            return;
        }
        if (path == overrides_key && !node.IsScalar()) {
            overrides_.reset(node);
            return;
        }
        const Row* row = find_row(path);
        if (row == nullptr) refuse_unknown(place, path);
        if (node.IsNull() || (node.IsScalar() && node.Scalar().empty()))
            throw BadInput("{}: {}: has no value ({})", place, path, row->key.values);
        if (!node.IsScalar())
            throw BadInput("{}: {}: must be one value, not a {} ({})", place, path,
                           node.IsMap() ? "map" : "list", row->key.values);
        row->read(spec_,
                  {place, path, node.Scalar(), node.Tag() == "!", row->key.values, file_.parent_path()});
    }

    JobSpec& spec_;
    const std::filesystem::path& file_;
    std::map<std::string, std::string> places_;  // key or section → "job.yaml:12"
    YAML::Node outputs_{YAML::NodeType::Undefined};
    YAML::Node overrides_{YAML::NodeType::Undefined};
};

// Applies "quantization.bits=3" and returns its key.
std::string apply_override(const std::string& text, JobSpec& spec, const std::filesystem::path& directory) {
    const auto where = "--set " + text;
    const auto equals = text.find('=');
    if (equals == std::string::npos || equals == 0)
        throw BadInput("{}: write --set KEY=VALUE, for example --set quantization.bits=3", where);
    const auto path = text.substr(0, equals);
    if (is_section(path))
        throw BadInput("{}: {} is a section; name a key of it: {}", where, path, list_text(names_in(path)));
    const Row* row = find_row(path);
    if (row == nullptr) refuse_unknown(where, path);
    const auto value = text.substr(equals + 1);
    if (value.empty()) throw BadInput("{}: {}: has no value ({})", where, path, row->key.values);
    row->read(spec, {where, path, value, false, row->key.values, directory});
    return path;
}

// `listed`: the output directories are in the list of outputs.
void require_keys(const Places& places, bool listed, const std::filesystem::path& file) {
    std::vector<std::string> missing;
    for (const auto& row : rows())
        if (row.key.default_value == "required" && !places.contains(row.key.path) &&
            !(listed && row.key.path == "output.directory"))
            missing.push_back(row.key.path);
    if (!missing.empty())
        throw BadInput("{}: {} {} missing; a job needs at least\n\n{}", file.string(), list_text(missing),
                       missing.size() == 1 ? "is" : "are", minimal_job);
}

// What shares the Hessians of the unquantized model.
void require_original(const JobSpec& spec, const Places& places) {
    const auto require = [&](bool wanted, const std::string& key) {
        if (!wanted || spec.quantization.propagate == "original") return;
        throw BadInput(
            "{}: {}: needs quantization.propagate: original, with which Hessians do not depend on how "
            "blocks are quantized",
            places.at(key), key);
    };
    require(spec.outputs.size() > 1, "outputs");
    require(!spec.calibration.save_hessians.empty(), "calibration.save_hessians");
    require(!spec.calibration.hessians.empty(), "calibration.hessians");
    if (!spec.calibration.save_hessians.empty() && !spec.calibration.hessians.empty())
        throw BadInput("{}: calibration.save_hessians: would only copy what calibration.hessians holds",
                       places.at("calibration.save_hessians"));
}

// What no key can refuse by itself.
void require_consistent(const JobSpec& spec, const Places& places) {
    if (spec.outputs.empty()) {
        require_grid(spec, places);
        require_rule_grids(spec);
    }
    require_one_of_bits(spec, places);
    if (spec.compute.backend == "cpu" && spec.compute.communicator == "nccl")
        throw BadInput("{}: compute.communicator: nccl needs GPUs, but compute.backend is cpu (auto | mpi)",
                       places.at("compute.communicator"));
    if (spec.compute.backend == "cpu" && spec.compute.device_memory)
        throw BadInput("{}: compute.device_memory is for GPUs, but compute.backend is cpu",
                       places.at("compute.device_memory"));
    if (spec.compute.activations != "auto" && spec.quantization.propagate == "original")
        throw BadInput(
            "{}: compute.activations: needs quantization.propagate: quantized; with original hidden states "
            "are always streamed from group to group",
            places.at("compute.activations"));
    require_original(spec, places);
    if (const auto contradiction = contradiction_in(spec.quantization); !contradiction.empty()) {
        const auto place = places.find(contradiction.substr(0, contradiction.find(':')));
        throw BadInput("{}: {}", place == places.end() ? "the job" : place->second, contradiction);
    }
    for (std::size_t i = 0; i < spec.outputs.size(); ++i) {
        for (std::size_t j = 0; j < i; ++j) {
            if (spec.outputs[i].output.directory == spec.outputs[j].output.directory)
                throw BadInput("{}: outputs: {} is there twice", places.at("outputs"),
                               spec.outputs[i].output.directory.string());
        }
    }
}

std::string read_file(const std::filesystem::path& file) {
    if (std::filesystem::is_directory(file))
        throw BadInput("{}: is a directory; name the job file in it", file.string());
    std::ifstream stream(file, std::ios::binary);
    if (!stream) throw BadInput("{}: cannot be opened; does the job file exist?", file.string());
    std::ostringstream text;
    text << stream.rdbuf();
    return text.str();
}

}  // namespace

JobSpec parse_job_spec(const std::string& text, const std::filesystem::path& file,
                       const std::vector<std::string>& overrides) {
    JobSpec spec;
    FileReader reader(spec, file);
    reader.read(text);
    auto places = reader.places();
    for (const auto& override : overrides)
        places[apply_override(override, spec, file.parent_path())] = "--set " + override;
    apply_preset(spec.quantization,
                 [&](std::string_view key) { return places.contains(fmt::format("quantization.{}", key)); });
    const auto rules = places.find(std::string(overrides_key));
    if (rules != places.end() && rules->second.starts_with("--set")) reader.forget_rules();
    reader.read_rules(spec, places);
    reader.read_outputs(places);
    require_keys(places, !spec.outputs.empty(), file);
    if (!spec.outputs.empty()) {
        const auto output = places.lower_bound("output");
        if (output->first != outputs_key)
            throw BadInput("{}: outputs: takes the place of {}, which is at {}: move it into the items",
                           places.at(std::string(outputs_key)), output->first, output->second);
        spec.output = spec.outputs.front().output;
    }
    require_consistent(spec, places);
    return spec;
}

JobSpec load_job_spec(const std::filesystem::path& file, const std::vector<std::string>& overrides) {
    return parse_job_spec(read_file(file), file, overrides);
}

namespace {

// Puts a key of `spec` below `root`; `path`: its name there.
void put(YAML::Node root, const std::string& path, const Row& row, const JobSpec& spec) {
    YAML::Node section = root;
    std::istringstream parents(parent_of(path));
    for (std::string name; std::getline(parents, name, '.');) section.reset(section[name]);
    section[name_of(path)] = row.write(spec);
}

YAML::Node rules_node(const JobSpec& spec) {
    YAML::Node list(YAML::NodeType::Sequence);
    for (const QuantizationRule& rule : spec.quantization.overrides) {
        YAML::Node item(YAML::NodeType::Map);
        item["match"] = rule.match;
        if (rule.skip) item["skip"] = "true";
        JobSpec job;
        job.quantization = rule.quantization;
        for (const std::string& key : rule_keys) {
            // Also what a preset decided for the rule, since the file names all keys of the job.
            const Row& row = *find_row(fmt::format("quantization.{}", key));
            const bool set = std::ranges::find(rule.keys, key) != rule.keys.end();
            if (!rule.skip && (set || row.write(job) != row.write(spec))) item[key] = row.write(job);
        }
        list.push_back(item);
    }
    return list;
}

// Puts the rules of `spec` below `root`, when it has any.
void put_rules(YAML::Node root, const JobSpec& spec) {
    if (!spec.quantization.overrides.empty()) root["quantization"]["overrides"] = rules_node(spec);
}

YAML::Node outputs_node(const JobSpec& spec) {
    YAML::Node list(YAML::NodeType::Sequence);
    for (const JobSpec& job : single_jobs(spec)) {
        YAML::Node item(YAML::NodeType::Map);
        for (const auto& row : rows()) {
            const std::string& path = row.key.path;
            if (path.starts_with("output.")) put(item, path.substr(path.find('.') + 1), row, job);
            // A preset of the item's own would decide what is not written.
            const bool decided = row.key.default_value == preset_default &&
                                 job.quantization.preset != spec.quantization.preset;
            if (path.starts_with("quantization.") && (decided || row.write(job) != row.write(spec)))
                put(item, path, row, job);
        }
        if (YAML::Dump(rules_node(job)) != YAML::Dump(rules_node(spec))) {
            if (job.quantization.overrides.empty()) item["quantization"]["overrides"] = "none";
            put_rules(item, job);
        }
        list.push_back(item);
    }
    return list;
}

}  // namespace

std::vector<JobSpec> single_jobs(const JobSpec& spec) {
    if (spec.outputs.empty()) return {spec};
    std::vector<JobSpec> jobs;
    for (const OutputVariant& variant : spec.outputs) {
        JobSpec& job = jobs.emplace_back(spec);
        job.outputs.clear();
        job.output = variant.output;
        job.quantization = variant.quantization;
    }
    return jobs;
}

std::string to_yaml(const JobSpec& spec) {
    YAML::Node root(YAML::NodeType::Map);
    for (const auto& row : rows()) {
        const std::string& path = row.key.path;
        const bool replaced = path == outputs_key || path.starts_with("output.");
        if (replaced && !spec.outputs.empty()) continue;
        put(root, path, row, spec);
    }
    put_rules(root, spec);
    if (!spec.outputs.empty()) root[std::string(outputs_key)] = outputs_node(spec);
    YAML::Emitter emitter;
    emitter << root;
    return std::string(emitter.c_str()) + '\n';
}

const std::vector<JobKey>& job_keys() {
    static const std::vector<JobKey> keys = [] {
        std::vector<JobKey> result;
        for (const auto& row : rows()) result.push_back(row.key);
        return result;
    }();
    return keys;
}

}  // namespace quantmill
