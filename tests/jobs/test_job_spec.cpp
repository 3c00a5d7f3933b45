#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <random>
#include <regex>

#include "jobs/foreign_keys.h"
#include "jobs/job_spec.h"
#include "kernels/error.h"

namespace quantmill {
namespace {

namespace fs = std::filesystem;

const std::string minimal =
    "model: models/tiny\n"
    "output:\n"
    "  directory: out/tiny\n"
    "calibration:\n"
    "  tokens: calib.h5\n";

JobSpec parse(const std::string& text, const std::vector<std::string>& overrides = {}) {
    return parse_job_spec(text, "/jobs/job.yaml", overrides);
}

// The message of the BadInput that parsing ends with.
std::string error_of(const std::string& text, const std::vector<std::string>& overrides = {}) {
    try {
        parse(text, overrides);
    } catch (const BadInput& error) {
        return error.what();
    }
    return "no error";
}

std::string override_error(const std::string& override) { return error_of(minimal, {override}); }

TEST(JobSpec, DefaultsAreTheDocumentedOnes) {
    const auto spec = parse(minimal);
    EXPECT_EQ(spec.model, "/jobs/models/tiny");
    EXPECT_EQ(spec.output.directory, "/jobs/out/tiny");
    EXPECT_EQ(spec.output.format, "gptq");
    EXPECT_EQ(spec.output.max_shard_size, 5'000'000'000u);
    EXPECT_EQ(spec.output.tensor_parallel, 1);
    EXPECT_FALSE(spec.output.allow_unservable);
    EXPECT_EQ(spec.calibration.tokens, "/jobs/calib.h5");
    EXPECT_EQ(spec.calibration.sequences, std::nullopt);
    EXPECT_EQ(spec.calibration.sequence_length, std::nullopt);
    EXPECT_FALSE(spec.calibration.allow_tokenizer_mismatch);
    EXPECT_EQ(spec.quantization.bits, 4);
    EXPECT_EQ(spec.quantization.group_size, 128);
    EXPECT_TRUE(spec.quantization.sym);
    EXPECT_FALSE(spec.quantization.desc_act);
    EXPECT_EQ(spec.quantization.damp_percent, 0.05);
    EXPECT_EQ(spec.quantization.damp_auto_increment, 0.01);
    EXPECT_TRUE(spec.quantization.true_sequential);
    EXPECT_EQ(spec.compute.backend, "auto");
    EXPECT_EQ(spec.compute.communicator, "auto");
}

const std::string complete = R"(
model: /models/x
output:
  directory: /out/x
  format: gptq_v2
  max_shard_size: 1.5GB
  serve: {tensor_parallel: 4}
  allow_unservable: true
calibration:
  tokens: /calib.h5
  sequences: 128
  sequence_length: 512
  allow_tokenizer_mismatch: true
  save_hessians: /h
  hessians: none
outputs: none
quantization:
  bits: 3
  group_size: -1
  sym: false
  desc_act: true
  damp_percent: 1e-2
  damp_auto_increment: 0.0025
  true_sequential: false
  propagate: original
  preset: gptqmodel
  act_group_aware: false
  static_groups: true
  scale_search: mse
  signed_scales: false
  scale_rounding: bf16
  refit: true
  sweeps: 3
  error_propagation_alpha: 0
  on_fallback: error
  target_bits: none
  target_choices: 2,3,4,8
  lm_head:
    bits: 8
    group_size: 64
  overrides: none
compute:
  backend: cuda
  communicator: mpi
  device_memory: 24GB
  activations: auto
  layer_groups: 3
  stall_timeout: 1.5min
)";

TEST(JobSpec, EveryKeyReachesItsMember) {
    const auto spec = parse(complete);
    EXPECT_EQ(spec.model, "/models/x");
    EXPECT_EQ(spec.output.directory, "/out/x");
    EXPECT_EQ(spec.output.format, "gptq_v2");
    EXPECT_EQ(spec.output.max_shard_size, 1'500'000'000u);
    EXPECT_EQ(spec.output.tensor_parallel, 4);
    EXPECT_TRUE(spec.output.allow_unservable);
    EXPECT_EQ(spec.calibration.tokens, "/calib.h5");
    EXPECT_EQ(spec.calibration.sequences, 128);
    EXPECT_EQ(spec.calibration.sequence_length, 512);
    EXPECT_TRUE(spec.calibration.allow_tokenizer_mismatch);
    EXPECT_EQ(spec.quantization.bits, 3);
    EXPECT_EQ(spec.quantization.group_size, -1);
    EXPECT_FALSE(spec.quantization.sym);
    EXPECT_TRUE(spec.quantization.desc_act);
    EXPECT_EQ(spec.quantization.damp_percent, 0.01);
    EXPECT_EQ(spec.quantization.damp_auto_increment, 0.0025);
    EXPECT_FALSE(spec.quantization.true_sequential);
    EXPECT_EQ(spec.calibration.save_hessians, "/h");
    EXPECT_EQ(spec.calibration.hessians, "");
    EXPECT_EQ(spec.quantization.propagate, "original");
    EXPECT_EQ(spec.quantization.preset, "gptqmodel");
    EXPECT_FALSE(spec.quantization.act_group_aware);
    EXPECT_TRUE(spec.quantization.static_groups);
    EXPECT_EQ(spec.quantization.scale_search, "mse");
    EXPECT_FALSE(spec.quantization.signed_scales);
    EXPECT_EQ(spec.quantization.scale_rounding, "bf16");
    EXPECT_TRUE(spec.quantization.refit);
    EXPECT_EQ(spec.quantization.sweeps, 3);
    EXPECT_EQ(spec.quantization.error_propagation_alpha, 0.0);
    EXPECT_EQ(parse(minimal, {"quantization.damp_percent=auto"}).quantization.damp_percent, std::nullopt);
    // Words may be quoted, as JSON has them.
    EXPECT_EQ(
        parse(std::string(minimal) + "quantization: {damp_percent: \"auto\"}").quantization.damp_percent,
        std::nullopt);
    EXPECT_EQ(spec.quantization.on_fallback, "error");
    EXPECT_EQ(spec.quantization.target_bits, std::nullopt);
    EXPECT_EQ(parse(minimal, {"quantization.target_bits=3.5"}).quantization.target_bits, 3.5);
    EXPECT_EQ(spec.quantization.lm_head_bits, 8);
    EXPECT_EQ(spec.quantization.lm_head_group_size, 64);
    EXPECT_TRUE(spec.quantization.overrides.empty());
    EXPECT_TRUE(parse(minimal, {"quantization.signed_scales=true"}).quantization.signed_scales);
    EXPECT_EQ(
        parse(minimal, {"quantization.error_propagation_alpha=0.25"}).quantization.error_propagation_alpha,
        0.25);
    EXPECT_EQ(spec.compute.backend, "cuda");
    EXPECT_EQ(spec.compute.communicator, "mpi");
    EXPECT_EQ(spec.compute.activations, "auto");
    EXPECT_EQ(parse(minimal, {"compute.activations=recompute"}).compute.activations, "recompute");
    EXPECT_EQ(spec.compute.layer_groups, 3);
    EXPECT_EQ(spec.compute.stall_timeout, 90.0);
    EXPECT_EQ(spec.compute.device_memory, 24'000'000'000U);
    EXPECT_EQ(std::ranges::count(complete, ':'), static_cast<int>(job_keys().size()) + 6)
        << "a key is missing from this test (6 sections)";
}

TEST(JobSpec, WrongValuesNameFileLineKeyAndWhatIsAllowed) {
    const std::pair<const char*, const char*> cases[] = {
        {"bits: 5", "bits: 5 is not allowed (2 | 3 | 4 | 8)"},
        {"bits: four", "bits: four is not a whole number (2 | 3 | 4 | 8)"},
        {"bits: 4.0", "bits: 4.0 is not a whole number (2 | 3 | 4 | 8)"},
        {"bits: 99999999999", "bits: 99999999999 is not allowed (2 | 3 | 4 | 8)"},
        {"bits: '4'", "bits: \"4\" is text: write the number without quotes (2 | 3 | 4 | 8)"},
        {"bits:", "bits: has no value (2 | 3 | 4 | 8)"},
        {"bits: ''", "bits: has no value (2 | 3 | 4 | 8)"},
        {"bits: [4]", "bits: must be one value, not a list (2 | 3 | 4 | 8)"},
        {"bits: {a: 4}", "bits: must be one value, not a map (2 | 3 | 4 | 8)"},
        {"group_size: 48", "group_size: 48 is not allowed (-1 | 16 | 32 | 64 | 128 | 256 | 512 | 1024)"},
        {"sym: yes", "sym: yes is not allowed (true | false)"},
        {"sym: 'true'", "sym: \"true\" is not allowed (true | false)"},
        {"damp_percent: 0", "damp_percent: 0 is not allowed (number > 0 and < 1 | auto)"},
        {"damp_percent: 5%", "damp_percent: 5% is not a number (number > 0 and < 1 | auto)"},
        {"damp_percent: nan", "damp_percent: nan is not a finite number (number > 0 and < 1 | auto)"},
        {"damp_percent: .nan", "damp_percent: .nan is not a number (number > 0 and < 1 | auto)"},
        {"damp_percent: -inf", "damp_percent: -inf is not a finite number (number > 0 and < 1 | auto)"},
        {"damp_percent: 1e400", "damp_percent: 1e400 is not allowed (number > 0 and < 1 | auto)"},
    };
    for (const auto& [line, message] : cases)
        EXPECT_EQ(error_of(minimal + "quantization:\n  " + line + "\n"),
                  std::string("/jobs/job.yaml:7: quantization.") + message);
    EXPECT_EQ(override_error("calibration.sequences=0"),
              "--set calibration.sequences=0: calibration.sequences: 0 is not allowed "
              "(whole number >= 1 | all)");
}

TEST(JobSpec, Sizes) {
    const std::pair<const char*, std::uint64_t> cases[] = {
        {"5GB", 5'000'000'000},   {"500MB", 500'000'000},
        {"2GiB", 2'147'483'648},  {"123456", 123'456},
        {"1.5GB", 1'500'000'000}, {"5 GB", 5'000'000'000},
        {"4kB", 4'000},           {"4KB", 4'000},
        {"512MiB", 536'870'912},  {"1TB", 1'000'000'000'000},
        {"2048B", 2048},          {"0.5TiB", 549'755'813'888}};
    for (const auto& [text, bytes] : cases)
        EXPECT_EQ(parse(minimal, {std::string("output.max_shard_size=") + text}).output.max_shard_size, bytes)
            << text;
    for (const std::string text : {"5G", "GB", "five GB", "5 gigabytes", "inf", "nanGB", "5GB ", "1e3GB"})
        EXPECT_NE(override_error("output.max_shard_size=" + text).find("is not a size"), std::string::npos)
            << text << ": " << override_error("output.max_shard_size=" + text);
    for (const std::string text : {"-5GB", "0", "999", "1e99", "99999999999TB"})
        EXPECT_NE(override_error("output.max_shard_size=" + text).find("is not "), std::string::npos)
            << text << ": " << override_error("output.max_shard_size=" + text);
}

TEST(JobSpec, UnknownKeysSuggestTheNearest) {
    EXPECT_EQ(error_of(minimal + "quantization:\n  group_sise: 64\n"),
              "/jobs/job.yaml:7: quantization.group_sise: unknown key; did you mean "
              "quantization.group_size? quantization has bits, group_size, sym, desc_act, damp_percent, "
              "damp_auto_increment, true_sequential, propagate, preset, act_group_aware, static_groups, "
              "scale_search, signed_scales, scale_rounding, refit, sweeps, error_propagation_alpha, "
              "on_fallback, target_bits, target_choices, lm_head, overrides");
    EXPECT_EQ(error_of(minimal + "quantisation:\n  bits: 3\n"),
              "/jobs/job.yaml:6: quantisation: unknown key; did you mean quantization? a job file has "
              "model, output, outputs, calibration, quantization, compute");
    // Right word, wrong place.
    EXPECT_NE(error_of("bits: 3\n" + minimal)
                  .find("job.yaml:1: bits: unknown key; did you mean "
                        "quantization.bits?"),
              std::string::npos);
    EXPECT_NE(override_error("output.tensor_parallel=2").find("output.serve.tensor_parallel"),
              std::string::npos);
    // Nothing near: what there is, and no guess.
    EXPECT_EQ(error_of("xylophone: 3\n" + minimal),
              "/jobs/job.yaml:1: xylophone: unknown key; a job file has model, output, outputs, calibration, "
              "quantization, compute");
}

TEST(JobSpec, NamesOfOtherToolsAreTranslated) {
    const std::pair<const char*, const char*> cases[] = {
        {"quantization.dampening_frac", "quantization.damp_percent"},
        {"dampening_frac", "quantization.damp_percent"},
        {"damp", "quantization.damp_percent"},
        {"quantization.actorder", "quantization.desc_act"},
        {"act_order", "quantization.desc_act"},
        {"ignore", "quantization.overrides"},
        {"quantization.scheme", "quantization.bits, quantization.group_size and quantization.sym"},
        {"w_bit", "quantization.bits"},
        {"q_group_size", "quantization.group_size"},
        {"num_calibration_samples", "calibration.sequences"},
        {"calibration.nsamples", "calibration.sequences"},
        {"max_seq_length", "calibration.sequence_length"},
        {"seqlen", "calibration.sequence_length"},
        {"quantization.dynamic", "quantization.overrides"},
        {"quantization.mse", "quantization.scale_search: mse"},
    };
    for (const auto& [key, advice] : cases) {
        const auto message = override_error(std::string(key) + "=1");
        EXPECT_NE(message.find(std::string(key) + ": unknown key; "), std::string::npos) << message;
        EXPECT_NE(message.find(advice, message.find(';')), std::string::npos) << message;
    }
}

TEST(JobSpec, KeysOfLaterVersionsAreNotGuessedAt) {
    for (const std::string key : {"run", "run.max_hours", "slurm.partition", "models", "max_parallel"}) {
        const auto message = override_error(key + "=1");
        EXPECT_NE(message.find("is not in this version"), std::string::npos) << message;
        EXPECT_EQ(message.find("did you mean"), std::string::npos) << message;
    }
    EXPECT_NE(error_of(minimal + "slurm:\n  partition: gpu\n")
                  .find("job.yaml:6: slurm: unknown key; slurm "
                        "is not in this version"),
              std::string::npos);
}

TEST(JobSpec, APresetDecidesWhatIsNotSet) {
    const auto best = parse(minimal, {"quantization.preset=best", "quantization.sweeps=1"}).quantization;
    EXPECT_TRUE(best.act_group_aware);
    EXPECT_EQ(best.scale_search, "hessian");
    EXPECT_EQ(best.sweeps, 1);
    EXPECT_EQ(best.error_propagation_alpha, 1.0);
    // What the other keys leave no sense is switched off.
    EXPECT_FALSE(parse(minimal, {"quantization.preset=best", "quantization.desc_act=true"})
                     .quantization.act_group_aware);
    EXPECT_EQ(parse(minimal, {"quantization.preset=best", "quantization.propagate=original"})
                  .quantization.error_propagation_alpha,
              0.0);
    const auto plain = parse(minimal, {"quantization.preset=plain"}).quantization;
    EXPECT_FALSE(plain.act_group_aware || plain.signed_scales || plain.refit);
    EXPECT_EQ(plain.scale_search, "minmax");
}

TEST(JobSpec, TheDefaultIsBalanced) {
    const auto decided = [](const std::string& text, const std::vector<std::string>& overrides) {
        const auto q = parse(text, overrides).quantization;
        return fmt::format("{} {} {} {} {} {} {} {} {}", q.preset, q.act_group_aware, q.static_groups,
                           q.scale_search, q.signed_scales, q.scale_rounding, q.refit, q.sweeps,
                           q.error_propagation_alpha);
    };
    EXPECT_EQ(decided(minimal, {}), "balanced true false hessian true auto false 0 0");
    EXPECT_EQ(decided(minimal, {"quantization.preset=balanced"}), decided(minimal, {}));
    // A QuantizationSpec that nobody parsed says the same.
    EXPECT_EQ(to_yaml(parse(minimal)), to_yaml([] {
                  JobSpec spec = parse(minimal);
                  spec.quantization = {};
                  return spec;
              }()));
    // What it decides gives way to a key that leaves it no sense, in the file and behind --set.
    EXPECT_EQ(decided(minimal, {"quantization.desc_act=true"}),
              "balanced false false hessian true auto false 0 0");
    const std::string asymmetric =
        "model: m\noutput: {directory: o, format: gptq_v2}\ncalibration: {tokens: t}\n"
        "quantization: {sym: false}\n";
    EXPECT_EQ(decided(asymmetric, {}), "balanced true false hessian false auto false 0 0");
    EXPECT_EQ(decided(asymmetric, {"quantization.desc_act=true"}),
              "balanced false false hessian false auto false 0 0");
    EXPECT_EQ(decided(asymmetric, {"quantization.sym=true"}), decided(minimal, {}));
}

TEST(JobSpec, WhatContradictsIsRefused) {
    const auto refused = [](const std::vector<std::string>& overrides) {
        return error_of(minimal, overrides);
    };
    EXPECT_NE(refused({"quantization.desc_act=true", "quantization.act_group_aware=true"})
                  .find("--set quantization.act_group_aware=true: quantization.act_group_aware: "),
              std::string::npos);
    EXPECT_NE(refused({"quantization.sym=false", "output.format=gptq_v2", "quantization.signed_scales=true"})
                  .find("needs quantization.sym"),
              std::string::npos);
    EXPECT_NE(refused({"quantization.propagate=original", "quantization.error_propagation_alpha=0.5"})
                  .find("needs quantization.propagate"),
              std::string::npos);
    const std::string two = "model: m\ncalibration:\n  tokens: c.h5\nquantization:\n  propagate: original\n" +
                            std::string("outputs:\n  - directory: a\n  - directory: b\n");
    for (const std::string& job : {minimal, two}) {
        EXPECT_NE(
            error_of(job, {"quantization.bits=4", "quantization.target_bits=3.5"}).find("set one of them"),
            std::string::npos)
            << job;
    }
}

TEST(JobSpec, AnOutputHasAPresetOfItsOwn) {
    const auto spec = parse(
        "model: m\ncalibration:\n  tokens: c.h5\n"
        "quantization:\n  propagate: original\n  preset: balanced\n  signed_scales: false\n"
        "outputs:\n  - directory: a\n  - directory: b\n    quantization:\n      preset: balanced\n"
        "  - directory: c\n    quantization:\n      desc_act: true\n");
    EXPECT_FALSE(spec.outputs[0].quantization.signed_scales);
    EXPECT_TRUE(spec.outputs[1].quantization.signed_scales);
    EXPECT_FALSE(spec.outputs[2].quantization.act_group_aware);
    EXPECT_TRUE(spec.outputs[1].quantization.act_group_aware);
    // The YAML of a spec keeps what an item sets beside a preset of its own, also where the job says the
    // same.
    const auto mixed = parse(
        "model: m\ncalibration: {tokens: c.h5}\nquantization: {propagate: original, scale_search: mse}\n"
        "outputs:\n  - {directory: a, quantization: {preset: best, scale_search: mse}}\n  - {directory: "
        "b}\n");
    const auto again = parse(to_yaml(mixed));
    EXPECT_EQ(again.outputs[0].quantization.scale_search, "mse");
    EXPECT_TRUE(again.outputs[0].quantization.refit);
    EXPECT_EQ(to_yaml(again), to_yaml(mixed));
}

const std::string three_outputs =
    "model: models/tiny\n"
    "calibration:\n"
    "  tokens: calib.h5\n"
    "outputs:\n"
    "  - directory: out/W4\n"
    "  - directory: out/W3\n"
    "    max_shard_size: 1GB\n"
    "    quantization:\n"
    "      bits: 3\n"
    "  - directory: out/W8\n"
    "    format: gptq_v2\n"
    "    serve: {tensor_parallel: 2}\n"
    "    quantization: {bits: 8, group_size: -1, sym: false}\n"
    "quantization:\n"
    "  propagate: original\n"
    "  group_size: 64\n";

TEST(JobSpec, OutputsAreJobsOfTheirOwn) {
    const auto spec = parse(three_outputs, {"quantization.damp_percent=0.1"});
    const auto jobs = single_jobs(spec);
    ASSERT_EQ(jobs.size(), 3u);
    EXPECT_EQ(jobs[0].output.directory, "/jobs/out/W4");
    EXPECT_EQ(jobs[0].quantization.bits, 4);
    EXPECT_EQ(jobs[1].output.directory, "/jobs/out/W3");
    EXPECT_EQ(jobs[1].output.max_shard_size, 1'000'000'000u);
    EXPECT_EQ(jobs[1].quantization.bits, 3);
    EXPECT_EQ(jobs[1].quantization.group_size, 64);  // which stands after the list
    EXPECT_EQ(jobs[2].output.format, "gptq_v2");
    EXPECT_EQ(jobs[2].output.tensor_parallel, 2);
    EXPECT_EQ(jobs[2].quantization.group_size, -1);
    EXPECT_FALSE(jobs[2].quantization.sym);
    for (const auto& job : jobs) {
        EXPECT_EQ(job.model, "/jobs/models/tiny");
        EXPECT_EQ(job.quantization.propagate, "original");
        EXPECT_EQ(job.quantization.damp_percent, 0.1);
        EXPECT_TRUE(job.outputs.empty());
        EXPECT_EQ(to_yaml(parse(to_yaml(job))), to_yaml(job));
    }
    EXPECT_EQ(to_yaml(parse(to_yaml(spec))), to_yaml(spec));
    const auto alone = single_jobs(parse(minimal));
    ASSERT_EQ(alone.size(), 1u);
    EXPECT_EQ(to_yaml(alone[0]), to_yaml(parse(minimal)));
}

TEST(JobSpec, WhatOutputsMustBe) {
    const auto error = [](const std::string& from, const std::string& to) {
        std::string text = three_outputs;
        EXPECT_NE(text.find(from), std::string::npos) << from;
        return error_of(text.replace(text.find(from), from.size(), to));
    };
    const auto expect = [](const std::string& message, const std::string& part) {
        EXPECT_NE(message.find(part), std::string::npos) << message;
    };
    expect(error("propagate: original", "bits: 4"),
           "job.yaml:4: outputs: needs quantization.propagate: original");
    expect(error("out/W3", "out/W4"), "job.yaml:4: outputs: /jobs/out/W4 is there twice");
    expect(error("bits: 3", "bits: 5"), "job.yaml:9: quantization.bits: 5 is not allowed");
    expect(error("bits: 3", "bitz: 3"),
           "job.yaml:9: quantization.bitz: unknown key; did you mean quantization.bits?");
    expect(error("bits: 3", "propagate: original"),
           "job.yaml:9: quantization.propagate: is one for the whole job");
    expect(error("format: gptq_v2", "format: gptq"), "needs output.format: gptq_v2");
    expect(error("directory: out/W3", "format: gptq"), "job.yaml:6: outputs: an item has no directory");
    expect(error("  - directory: out/W4\n", "  - 7\n"), "job.yaml:5: outputs: an item must hold keys");
    expect(error("model:", "output: {format: gptq}\nmodel:"), "outputs: takes the place of output");
    expect(error_of(three_outputs, {"output.format=gptq"}), "takes the place of output.format");
    expect(error_of(minimal, {"outputs=x"}), "outputs: x is not allowed: a list is written in the job file");
    expect(error_of("model: m\ncalibration: {tokens: t}\noutputs: {directory: d}\n"),
           "job.yaml:3: outputs: must be a list");
    expect(error_of("model: m\ncalibration: {tokens: t}\noutputs: none\n"), "output.directory is missing");
    expect(error_of("model: m\ncalibration: {tokens: t}\noutputs: 5\n"),
           "job.yaml:3: outputs: 5 is not allowed: a list");
}

TEST(JobSpec, RulesChangeWhatTheyName) {
    const auto spec = parse(minimal +
                            "quantization:\n  bits: 3\n  preset: balanced\n  overrides:\n"
                            "    - match: '*.down_proj'\n      bits: 8\n      damp_percent: 0.1\n"
                            "    - {match: 're:.*o_proj', desc_act: true}\n    - {match: '*', skip: true}\n");
    const auto& rules = spec.quantization.overrides;
    ASSERT_EQ(rules.size(), 3u);
    EXPECT_EQ(rules[0].match, "*.down_proj");
    EXPECT_EQ(rules[0].place, "/jobs/job.yaml:10");
    EXPECT_EQ(rules[0].quantization.bits, 8);
    EXPECT_EQ(rules[0].quantization.damp_percent, 0.1);
    EXPECT_TRUE(rules[0].quantization.act_group_aware) << "the preset's, as for the job";
    EXPECT_EQ(rules[1].quantization.bits, 3);
    EXPECT_TRUE(rules[1].quantization.desc_act);
    EXPECT_FALSE(rules[1].quantization.act_group_aware) << "which desc_act leaves no sense";
    EXPECT_TRUE(rules[2].skip);
    EXPECT_EQ(spec.quantization.bits, 3);
    EXPECT_EQ(to_yaml(parse(to_yaml(spec))), to_yaml(spec));
    EXPECT_NE(to_yaml(spec).find("damp_percent: 0.1"), std::string::npos);
    EXPECT_TRUE(parse(minimal, {"quantization.overrides=none"}).quantization.overrides.empty());
}

TEST(JobSpec, WhatRulesMustBe) {
    const auto error = [](const std::string& rules, const std::string& more = "") {
        return error_of(minimal + "quantization:\n" + more + "  overrides:\n" + rules);
    };
    const auto expect = [](const std::string& message, const std::string& part) {
        EXPECT_NE(message.find(part), std::string::npos) << message;
    };
    expect(error("    - {bits: 3}\n"), "job.yaml:8: quantization.overrides: a rule has no match");
    expect(error("    - {match: x}\n"), "either skip: true, or keys to set: bits, group_size");
    expect(error("    - {match: x, skip: true, bits: 3}\n"), "either skip: true, or keys to set");
    expect(error("    - {match: x, bits: 5}\n"), "job.yaml:8: quantization.bits: 5 is not allowed");
    expect(error("    - {match: x, bits: 3, bits: 4}\n"), "second time");
    expect(error("    - {match: x, match: y, bits: 4}\n"), "second time");
    expect(error("    - {match: x, propagate: original}\n"),
           "propagate: is not a key of a rule (match, skip, bits");
    expect(error("    - {match: 're:(', bits: 3}\n"), "( is no regular expression");
    expect(error("    - {match: '[', bits: 3}\n"), "[ is no glob");
    expect(error("    - 7\n"), "job.yaml:8: quantization.overrides: a rule must hold keys");
    expect(error("    match: x\n"), "must be a list");
    expect(error("    - {match: x, sym: false}\n"), "job.yaml:8: quantization.overrides: sym: false needs");
    expect(error("    - {match: x, sym: false}\n", "  signed_scales: true\n"),
           "quantization.signed_scales: needs");
    expect(override_error("quantization.overrides=x"), "a list is written in the job file");
    expect(override_error("quantization.lm_head.group_size=64"), "needs quantization.lm_head.bits");
    expect(override_error("quantization.lm_head=8"), "is a section");
    expect(error("    - {match: x, sym: true}\n", "  target_bits: 3.5\n"), "a rule sets bits, or skip: true");
    expect(error_of(minimal, {"quantization.target_bits=3", "quantization.bits=3"}), "set one of them");
    expect(override_error("quantization.target_choices=4,8"), "needs quantization.target_bits");
    expect(override_error("quantization.target_bits=1.5"), "1.5 is not allowed (number from 2 to 9 | none)");
}

TEST(JobSpec, AnOutputHasTheRulesOfTheJobOrItsOwn) {
    const auto spec = parse(
        "model: m\ncalibration: {tokens: t}\nquantization:\n  propagate: original\n  overrides:\n"
        "    - {match: '*.o_proj', bits: 8}\noutputs:\n  - directory: a\n    quantization: {group_size: 32}\n"
        "  - directory: b\n    quantization:\n      overrides:\n        - {match: x, skip: true}\n"
        "  - directory: c\n    quantization: {overrides: none}\n");
    const auto rules = [&](std::size_t i) { return spec.outputs[i].quantization.overrides; };
    ASSERT_EQ(rules(0).size(), 1u);
    EXPECT_EQ(rules(0)[0].quantization.bits, 8);
    EXPECT_EQ(rules(0)[0].quantization.group_size, 32) << "the item's";
    ASSERT_EQ(rules(1).size(), 1u);
    EXPECT_TRUE(rules(1)[0].skip);
    EXPECT_TRUE(rules(2).empty());
    EXPECT_EQ(to_yaml(parse(to_yaml(spec))), to_yaml(spec));
}

TEST(JobSpec, HessiansBelongToTheOriginalModel) {
    for (const std::string key : {"calibration.hessians", "calibration.save_hessians"}) {
        EXPECT_NE(override_error(key + "=dir").find(key + ": needs quantization.propagate: original"),
                  std::string::npos);
        EXPECT_EQ(error_of(minimal, {key + "=dir", "quantization.propagate=original"}), "no error");
    }
    EXPECT_EQ(parse(minimal, {"calibration.hessians=none"}).calibration.hessians, "");
    EXPECT_NE(error_of(minimal, {"calibration.hessians=a", "calibration.save_hessians=b",
                                 "quantization.propagate=original"})
                  .find("would only copy"),
              std::string::npos);
}

TEST(JobSpec, Durations) {
    const auto timeout = [](const std::string& text) {
        return parse(minimal, {"compute.stall_timeout=" + text}).compute.stall_timeout;
    };
    EXPECT_EQ(parse(minimal).compute.stall_timeout, 600.0);
    EXPECT_EQ(timeout("90s"), 90.0);
    EXPECT_EQ(timeout("1.5min"), 90.0);
    EXPECT_EQ(timeout("2h"), 7200.0);
    for (const std::string bad : {"10", "0.5s", "169h", "-1s", "min", "1 s", "nans", "1e3s"}) {
        EXPECT_NE(override_error("compute.stall_timeout=" + bad).find("compute.stall_timeout: " + bad),
                  std::string::npos)
            << bad;
    }
}

TEST(JobSpec, AdviceNamesOnlyKeysThatExist) {
    const std::regex advised("write ((quantization|calibration|output|compute)\\.[a-z_.]+[a-z]|model)");
    int seen = 0;
    for (const std::string key : {"dampening_frac", "dampening", "percdamp",       "damp",
                                  "actorder",       "act_order", "scheme",         "config_groups",
                                  "wbits",          "w_bit",     "num_bits",       "q_group_size",
                                  "groupsize",      "symmetric", "zero_point",     "num_calibration_samples",
                                  "num_samples",    "nsamples",  "max_seq_length", "max_seq_len",
                                  "seqlen",         "seq_len",   "model_id",       "model_path",
                                  "output_dir",     "save_dir",  "device",         "checkpoint_format",
                                  "device_map"}) {
        const auto advice = advice_for_foreign_key(key).value_or("none");
        std::smatch match;
        ASSERT_TRUE(std::regex_search(advice, match, advised)) << key << ": " << advice;
        const auto name = match[1].str();
        EXPECT_TRUE(std::ranges::any_of(job_keys(), [&](const auto& known) { return known.path == name; }))
            << key << " → " << name;
        ++seen;
    }
    EXPECT_EQ(seen, 29);
    for (const auto& key : job_keys())
        EXPECT_EQ(advice_for_foreign_key(key.path), std::nullopt) << key.path << " is ours";
}

TEST(JobSpec, DuplicateKeysNameBothLines) {
    EXPECT_EQ(error_of(minimal + "quantization:\n  bits: 4\n  sym: true\n  bits: 4\n"),
              "/jobs/job.yaml:9: quantization.bits: is here a second time; the first is at /jobs/job.yaml:7");
    EXPECT_EQ(error_of(minimal + "output:\n  format: gptq\n"),
              "/jobs/job.yaml:6: output: is here a second time; the first is at /jobs/job.yaml:2");
    // The same key in flow style and with a dot must not slip past.
    EXPECT_NE(error_of(minimal + "quantization: {bits: 3, bits: 3}\n").find("second time"),
              std::string::npos);
    EXPECT_NE(error_of(minimal + "quantization.bits: 3\n").find("only --set joins names with dots"),
              std::string::npos);
}

TEST(JobSpec, FilesThatAreNoJob) {
    for (const std::string text : {"", "\n\n", "# only a comment\n", "---\n", "~\n"}) {
        const auto message = error_of(text);
        EXPECT_NE(message.find("/jobs/job.yaml: is empty; a job needs at least"), std::string::npos)
            << message;
        EXPECT_NE(message.find("calibration:\n  tokens:"), std::string::npos);
    }
    EXPECT_NE(error_of("- a\n- b\n").find("job.yaml:1: holds no keys"), std::string::npos);
    EXPECT_NE(error_of("just words\n").find("job.yaml:1: holds no keys"), std::string::npos);
    const auto syntax = error_of("model: x\noutput: [1, 2\nfoo: }\n");
    EXPECT_TRUE(std::regex_search(syntax, std::regex("^/jobs/job.yaml:\\d+:\\d+: is not YAML: "))) << syntax;
    EXPECT_NE(error_of("model: *nothing\n").find("job.yaml:1:"), std::string::npos);
    // YAML::Load would leave out the rest, YAML::LoadAll would not come back from the comma.
    for (const auto& text : {minimal + "---\n" + minimal, "{model: x}\n\n\n\n\n" + minimal})
        EXPECT_NE(error_of(text).find("job.yaml:6:1: is not YAML: this does not belong"), std::string::npos)
            << error_of(text);
    EXPECT_NE(error_of("," + minimal).find("job.yaml:1:1: is not YAML"), std::string::npos);
    EXPECT_NE(error_of("? [a, b]\n: c\n").find("job.yaml:1: a key must be a plain word"), std::string::npos);
    EXPECT_NE(error_of(minimal + "quantization: 4\n")
                  .find("job.yaml:6: quantization: must hold keys below "
                        "it: bits"),
              std::string::npos);
}

TEST(JobSpec, AnEmptySectionIsTheDefaults) {
    EXPECT_EQ(to_yaml(parse(minimal + "quantization:\n  # bits: 3\n")), to_yaml(parse(minimal)));
}

TEST(JobSpec, MissingKeysComeWithAnExample) {
    const auto message = error_of("model: x\noutput: {format: gptq}\n");
    EXPECT_NE(message.find("/jobs/job.yaml: output.directory, calibration.tokens are missing"),
              std::string::npos)
        << message;
    const auto example = message.substr(message.find("\n\n") + 2);
    EXPECT_NO_THROW(parse(example)) << example;
    EXPECT_EQ(parse("model: x\noutput: {directory: o}\n", {"calibration.tokens=c.h5"}).calibration.tokens,
              "/jobs/c.h5");
}

TEST(JobSpec, OverridesApplyInOrderAfterTheFile) {
    const auto text = minimal + "quantization:\n  bits: 8\n";
    EXPECT_EQ(parse(text, {"quantization.bits=3", "quantization.bits=2"}).quantization.bits, 2);
    EXPECT_EQ(parse(minimal + "  sequences: 5\n", {"calibration.sequences=all"}).calibration.sequences,
              std::nullopt);
    EXPECT_EQ(parse(minimal, {"model=a=b: c # d"}).model, "/jobs/a=b: c # d");
    EXPECT_EQ(override_error("quantization.bits=5"),
              "--set quantization.bits=5: quantization.bits: 5 is not allowed (2 | 3 | 4 | 8)");
    EXPECT_NE(override_error("quantization.bits").find("write --set KEY=VALUE"), std::string::npos);
    EXPECT_NE(override_error("=5").find("write --set KEY=VALUE"), std::string::npos);
    EXPECT_NE(override_error("quantization.bits=").find("has no value"), std::string::npos);
    EXPECT_NE(override_error("quantization=5").find("is a section"), std::string::npos);
    // The file must be valid by itself.
    EXPECT_NE(error_of(minimal + "quantization:\n  bits: 5\n", {"quantization.bits=4"}).find("job.yaml:7"),
              std::string::npos);
}

TEST(JobSpec, PathsAreRelativeToTheJobFile) {
    const auto spec = parse_job_spec(minimal, "sub/job.yaml", {"model=../m/./x/"});
    EXPECT_EQ(spec.model, fs::current_path() / "m" / "x");
    EXPECT_EQ(parse_job_spec(minimal, "job.yaml", {}).model, fs::current_path() / "models/tiny");
    EXPECT_EQ(parse(minimal, {"model=/abs/x"}).model, "/abs/x");
    EXPECT_EQ(parse(minimal, {"model=."}).model, "/jobs");
    EXPECT_NE(override_error("model=~/x").find("~, which is not expanded"), std::string::npos);
}

TEST(JobSpec, ContradictionsAreRefused) {
    EXPECT_NE(error_of(minimal + "quantization:\n  sym: false\n")
                  .find("job.yaml:7: quantization.sym: false "
                        "needs output.format: gptq_v2"),
              std::string::npos);
    EXPECT_NO_THROW(parse(minimal, {"quantization.sym=false", "output.format=gptq_v2"}));
    EXPECT_NE(error_of(minimal, {"compute.backend=cpu", "compute.communicator=nccl"})
                  .find("--set compute.communicator=nccl: compute.communicator: nccl needs GPUs"),
              std::string::npos);
    EXPECT_NE(error_of(minimal, {"compute.activations=recompute", "quantization.propagate=original"})
                  .find("compute.activations: needs quantization.propagate: quantized"),
              std::string::npos);
}

TEST(JobSpec, YamlOfASpecReadsBackEqual) {
    const auto first = parse(complete, {"model=/odd: #path 'x'", "output.max_shard_size=123457"});
    const auto text = to_yaml(first);
    const auto second = parse_job_spec(text, "/elsewhere/x.yaml", {});
    EXPECT_EQ(to_yaml(second), text);
    EXPECT_EQ(second.model, "/odd: #path 'x'");
    EXPECT_EQ(second.output.max_shard_size, 123'457u);
    EXPECT_EQ(second.quantization.damp_auto_increment, 0.0025);
    EXPECT_EQ(second.quantization.group_size, -1);
    const auto defaults = to_yaml(parse(minimal));
    EXPECT_EQ(to_yaml(parse(defaults)), defaults);
    for (const auto& key : job_keys())
        EXPECT_NE(text.find(key.path.substr(key.path.rfind('.') + 1) + ": "), std::string::npos) << key.path;
}

TEST(JobSpec, EachKeyOfTheTableIsAcceptedWithItsDefault) {
    for (const auto& key : job_keys()) {
        if (key.default_value == "required" || key.default_value == "the preset's") continue;
        EXPECT_NO_THROW(parse(minimal, {key.path + "=" + key.default_value})) << key.path;
    }
}

TEST(JobSpec, FilesOnDisk) {
    const auto directory = fs::temp_directory_path() / ("job_spec_" + std::to_string(std::random_device{}()));
    fs::create_directories(directory);
    std::ofstream(directory / "job.yaml") << minimal;
    EXPECT_EQ(load_job_spec(directory / "job.yaml", {}).model, directory / "models/tiny");
    // Up from a link is up from where it leads.
    fs::create_directories(directory / "elsewhere/jobs");
    fs::create_directory_symlink("elsewhere/jobs", directory / "link");
    std::ofstream(directory / "elsewhere/jobs/job.yaml") << minimal;
    std::ofstream(directory / "elsewhere/found") << "here";
    EXPECT_TRUE(fs::exists(load_job_spec(directory / "link/job.yaml", {"model=../found"}).model));
    EXPECT_THROW(load_job_spec(directory, {}), BadInput);
    EXPECT_THROW(load_job_spec(directory / "none.yaml", {}), BadInput);
    fs::remove_all(directory);
}

// Whatever the file holds, the answer is a spec or a BadInput that names the file.
TEST(JobSpec, DamagedFilesNeverDoAnythingElse) {
    const auto seed = std::random_device{}();
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    std::mt19937 random(seed);
    const std::string spice = "{}[]:,-?&*!|>'\"%@`#~ \n\t\x01\xff=a0";
    for (int i = 0; i < 3000; ++i) {
        auto text = complete;
        for (auto changes = 1 + random() % 4; changes > 0; --changes) {
            const auto at = random() % text.size();
            if (random() % 2 == 0)
                text[at] = spice[random() % spice.size()];
            else
                text.erase(at, random() % 9);
            if (text.empty()) text = " ";
        }
        try {
            parse(text);
        } catch (const BadInput& error) {
            ASSERT_TRUE(std::string(error.what()).starts_with("/jobs/job.yaml:")) << error.what();
        } catch (const std::exception& error) {
            FAIL() << "text:\n" << text << "\nthrew " << error.what();
        }
    }
}

}  // namespace
}  // namespace quantmill
