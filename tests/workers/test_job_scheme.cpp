#include <gtest/gtest.h>

#include "tests/pipeline/expect_error.h"
#include "tests/pipeline/tiny_checkpoint.h"
#include "workers/job_scheme.h"

namespace quantmill {
namespace {

using testing::expect_error;

class JobScheme : public ::testing::Test {
protected:
    // Of a job with these lines below `quantization:`.
    QuantizationScheme scheme(const std::string& lines) {
        const JobSpec spec = parse_job_spec(
            "model: m\noutput: {directory: o, format: gptq_v2}\ncalibration: {tokens: t}\nquantization:\n" +
                lines,
            "job.yaml", {});
        return scheme_of_job(spec, graph_, false);
    }

    ModelGraph graph_ = build_model_graph(testing::tiny_config("LlamaForCausalLM"), "config.json");
};

TEST_F(JobScheme, TheFirstRuleThatMatchesCounts) {
    const auto chosen = scheme(
        "  bits: 4\n  overrides:\n"
        "    - {match: 'model.layers.0.self_attn.*', bits: 8, group_size: 32}\n"
        "    - {match: 're:.*\\.o_proj', skip: true}\n"
        "    - {match: '*.down_proj', bits: 3, sym: false}\n");
    EXPECT_EQ(chosen.options_at(0, 0)->grid.bits, 8);
    EXPECT_EQ(chosen.options_at(0, 0)->grid.group_size, 32);
    EXPECT_EQ(chosen.options_at(0, 1)->grid.bits, 8);
    EXPECT_FALSE(chosen.options_at(1, 1));
    EXPECT_EQ(chosen.options_at(1, 0), chosen.usual());
    EXPECT_EQ(chosen.options_at(0, 2)->grid.bits, 4);
    for (int block = 0; block < 2; ++block) {
        EXPECT_EQ(chosen.options_at(block, 3)->grid.bits, 3);
        EXPECT_FALSE(chosen.options_at(block, 3)->grid.sym);
        EXPECT_EQ(chosen.options_at(block, 3)->grid.group_size, 128)
            << "what a rule does not set is the job's";
    }
}

TEST_F(JobScheme, LmHeadHasBitsAndGroupsOfItsOwn) {
    EXPECT_FALSE(scheme("  bits: 4\n").quantizes_head());
    const auto own = scheme("  bits: 3\n  lm_head: {bits: 8, group_size: 32}\n");
    EXPECT_EQ(own.options_at(2, 0)->grid.bits, 8);
    EXPECT_EQ(own.options_at(2, 0)->grid.group_size, 32);
    EXPECT_EQ(scheme("  group_size: 64\n  lm_head: {bits: 4}\n").options_at(2, 0)->grid.group_size, 64);
}

TEST_F(JobScheme, RulesThatDoNothingOrSplitAreRefused) {
    const auto refuses = [this](const std::string& rules, const std::vector<std::string>& parts) {
        expect_error<BadInput>([&] { scheme("  overrides:\n" + rules); }, parts);
    };
    refuses("    - {match: 'layers.0.*', bits: 8}\n",
            {"job.yaml:6: quantization.overrides: match: layers.0.*", "matches no linear",
             "model.layers.0.self_attn.q_proj"});
    refuses("    - {match: lm_head, bits: 8}\n", {"job.yaml:6", "matches no linear"});
    refuses("    - {match: '.*[.](q|k|v)_proj', bits: 8}\n",
            {"matches no linear", "a regular expression is written behind re:"});
    refuses("    - {match: '*', bits: 8}\n    - {match: '*o_proj', skip: true}\n",
            {"job.yaml:7", "decides about no linear", "earlier rules"});
    refuses("    - {match: '*.q_proj', bits: 8}\n",
            {"job.yaml:6", "self_attn.q_proj and model.layers.0.self_attn.k_proj", "fuse qkv",
             "re:.*self_attn\\.(q_proj|k_proj|v_proj)"});
    refuses("    - {match: 're:.*\\.1\\..*up_proj', skip: true}\n",
            {"job.yaml:6", "model.layers.1.mlp.gate_proj and model.layers.1.mlp.up_proj"});
    // Rules that come to the same split nothing.
    EXPECT_EQ(
        scheme("  overrides:\n    - {match: '*.q_proj', bits: 8}\n    - {match: '*.[kv]_proj', bits: 8}\n")
            .options_at(1, 0)
            ->grid.bits,
        8);
}

}  // namespace
}  // namespace quantmill
