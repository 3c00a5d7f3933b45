#include <gtest/gtest.h>

#include <cstdlib>

#include "jobs/job_spec.h"
#include "workers/cli.h"

namespace quantmill {
namespace {

CommandLine parse(std::vector<const char*> words) {
    words.insert(words.begin(), "quantmill");
    return parse_command_line(static_cast<int>(words.size()), words.data(), "quantmill 1.2.3 (abc)");
}

PrintCommand printed(std::vector<const char*> words) {
    const auto line = parse(std::move(words));
    const auto* print = std::get_if<PrintCommand>(&line.command);
    return print != nullptr ? *print : PrintCommand{ExitCode::internal, "accepted"};
}

class Cli : public testing::Test {
protected:
    void SetUp() override { unsetenv("QUANTMILL_LOG"); }
    void TearDown() override { unsetenv("QUANTMILL_LOG"); }
};

TEST_F(Cli, Run) {
    // Options do not swallow the job file, and keep their order.
    const auto line = parse({"run", "--set", "a=1", "--set", "b=[x, y]", "job.yaml", "--set", "c=-1",
                             "--overwrite", "--log-level", "debug"});
    const auto& run = std::get<RunCommand>(line.command);
    EXPECT_EQ(run.job, "job.yaml");
    EXPECT_EQ(run.overrides, (std::vector<std::string>{"a=1", "b=[x, y]", "c=-1"}));
    EXPECT_TRUE(run.overwrite);
    EXPECT_EQ(line.log_level, "debug");
    const auto plain = parse({"run", "job.yaml"});
    EXPECT_FALSE(std::get<RunCommand>(plain.command).overwrite);
    EXPECT_TRUE(std::get<RunCommand>(plain.command).overrides.empty());
    EXPECT_EQ(plain.log_level, "info");
}

TEST_F(Cli, Plan) {
    const auto plain = parse({"plan", "job.yaml", "--set", "quantization.bits=3"});
    EXPECT_EQ(std::get<PlanCommand>(plain.command).job, "job.yaml");
    EXPECT_EQ(std::get<PlanCommand>(plain.command).overrides,
              (std::vector<std::string>{"quantization.bits=3"}));
    EXPECT_TRUE(std::get<PlanCommand>(plain.command).measure);
    EXPECT_FALSE(std::get<PlanCommand>(parse({"plan", "job.yaml", "--no-measure"}).command).measure);
    EXPECT_FALSE(std::get<PlanCommand>(plain.command).overwrite);
    EXPECT_TRUE(std::get<PlanCommand>(parse({"plan", "job.yaml", "--overwrite"}).command).overwrite);
}

TEST_F(Cli, Eval) {
    const auto plain = parse({"eval", "--model", "m", "--tokens", "t.h5"});
    const auto& defaults = std::get<EvalCommand>(plain.command);
    EXPECT_EQ(defaults.model, "m");
    EXPECT_EQ(defaults.tokens, "t.h5");
    EXPECT_EQ(defaults.sequence_length, std::nullopt);
    EXPECT_EQ(defaults.sequences, std::nullopt);
    EXPECT_EQ(defaults.json, std::nullopt);
    EXPECT_EQ(defaults.logits, std::nullopt);
    EXPECT_EQ(defaults.backend, "auto");
    EXPECT_FALSE(defaults.allow_tokenizer_mismatch);
    const auto line = parse({"eval", "--model", "m", "--tokens", "t.h5", "--sequence-length", "512",
                             "--sequences", "9", "--json", "j", "--logits", "l.safetensors", "--backend",
                             "cuda", "--allow-tokenizer-mismatch"});
    const auto& eval = std::get<EvalCommand>(line.command);
    EXPECT_EQ(eval.sequence_length, 512);
    EXPECT_EQ(eval.sequences, 9);
    EXPECT_EQ(eval.json, "j");
    EXPECT_EQ(eval.logits, "l.safetensors");
    EXPECT_EQ(eval.backend, "cuda");
    EXPECT_TRUE(eval.allow_tokenizer_mismatch);
    EXPECT_FALSE(eval.allow_calibration_tokens);
    EXPECT_FALSE(eval.reference);
    const auto text =
        parse({"eval", "--model", "m", "--text", "x", "--reference", "r", "--allow-calibration-tokens"});
    EXPECT_EQ(std::get<EvalCommand>(text.command).text, "x");
    EXPECT_EQ(std::get<EvalCommand>(text.command).reference, "r");
    EXPECT_TRUE(std::get<EvalCommand>(text.command).allow_calibration_tokens);
}

TEST_F(Cli, Compare) {
    const auto line = parse({"compare", "x.json", "y", "--reference", "r", "--tokens", "t.h5"});
    const auto& compare = std::get<CompareCommand>(line.command);
    EXPECT_EQ(compare.a, "x.json");
    EXPECT_EQ(compare.b, "y");
    EXPECT_EQ(compare.eval.reference, "r");
    EXPECT_EQ(compare.eval.tokens, "t.h5");
}

TEST_F(Cli, Inspect) {
    EXPECT_EQ(std::get<InspectCommand>(parse({"inspect", "out/x"}).command).directory, "out/x");
}

TEST_F(Cli, MistakesEndWithTwoAndNameTheRemedy) {
    const std::pair<std::vector<const char*>, const char*> cases[] = {
        {{"rum", "job.yaml"},
         "rum is not a command (run | plan | eval | compare | inspect); did you mean run?"},
        {{"quantize", "job.yaml"}, "quantize is not a command (run | plan | eval | compare | inspect)\n"},
        {{"job.yaml"}, "job.yaml is not a command"},
        {{"run"}, "job is required"},
        {{"run", "a.yaml", "b.yaml"}, "b.yaml"},
        {{"run", "a.yaml", "--overwite"}, "--overwite"},
        {{"run", "a.yaml", "--log-level", "loud"}, "loud"},
        {{"plan", "a.yaml", "--overwite"}, "--overwite"},
        {{"eval", "--model", "m"}, "--tokens STORE.h5 or --text FILE is required"},
        {{"eval", "--model", "m", "--tokens", "t", "--text", "x"}, "--tokens excludes --text"},
        {{"compare", "a.json"}, "b is required"},
        {{"eval", "--model", "m", "--tokens", "t", "--sequences", "0"}, "--sequences"},
        {{"eval", "--model", "m", "--tokens", "t", "--sequence-length", "ten"}, "--sequence-length"},
        {{"eval", "--model", "m", "--tokens", "t", "--backend", "tpu"}, "tpu"},
        {{"inspect"}, "directory is required"},
        {{"--log-level", "debug", "run", "a.yaml"}, "--log-level"},
    };
    for (const auto& [words, message] : cases) {
        const auto print = printed(words);
        EXPECT_EQ(print.code, ExitCode::bad_input) << print.text;
        EXPECT_NE(print.text.find(message), std::string::npos) << print.text;
        EXPECT_NE(print.text.find("--help"), std::string::npos) << print.text;
    }
}

TEST_F(Cli, HelpTeaches) {
    const auto run = printed({"run", "--help"});
    EXPECT_EQ(run.code, ExitCode::ok);
    for (const auto& key : job_keys()) EXPECT_NE(run.text.find(key.path), std::string::npos) << key.path;
    for (const char* command : {"run", "plan", "eval", "compare", "inspect"}) {
        const auto print = printed({command, "--help"});
        EXPECT_EQ(print.code, ExitCode::ok);
        for (const auto& part : {std::string("Examples:\n  quantmill ") + command, std::string("\n  85  "),
                                 std::string("QUANTMILL_LOG"), std::string("Usage: quantmill ") + command})
            EXPECT_NE(print.text.find(part), std::string::npos) << part << " in\n" << print.text;
        EXPECT_NE(printed({"--help"}).text.find(std::string("\n  ") + command), std::string::npos);
    }
    EXPECT_EQ(printed({"-h"}).code, ExitCode::ok);
    // Without a word: the same, but scripts must notice.
    EXPECT_EQ(printed({}).code, ExitCode::bad_input);
    EXPECT_EQ(printed({}).text, printed({"--help"}).text);
}

TEST_F(Cli, Version) {
    const auto print = printed({"--version"});
    EXPECT_EQ(print.code, ExitCode::ok);
    EXPECT_EQ(print.text, "quantmill 1.2.3 (abc)\n");
}

TEST_F(Cli, LogLevelFromTheEnvironmentYieldsToTheOption) {
    setenv("QUANTMILL_LOG", "trace", 1);
    EXPECT_EQ(parse({"run", "a.yaml"}).log_level, "trace");
    EXPECT_EQ(parse({"run", "a.yaml", "--log-level", "warn"}).log_level, "warn");
    setenv("QUANTMILL_LOG", "", 1);
    EXPECT_EQ(parse({"run", "a.yaml"}).log_level, "info");
    setenv("QUANTMILL_LOG", "loud", 1);
    EXPECT_NE(printed({"run", "a.yaml"}).text.find("QUANTMILL_LOG=loud"), std::string::npos);
}

}  // namespace
}  // namespace quantmill
