#include <gtest/gtest.h>

#include <limits>
#include <nlohmann/json.hpp>

#include "jobs/report.h"
#include "jobs/text.h"

namespace quantmill {
namespace {

LinearReport linear(int block, const std::string& group, const std::string& name, std::int64_t rows,
                    std::int64_t columns, double loss) {
    LinearReport report;
    report.module = "model.layers." + std::to_string(block) + "." + name;
    report.block = block;
    report.group = group;
    report.rows = rows;
    report.columns = columns;
    report.bits = 4;
    report.group_size = 64;
    report.loss = loss;
    report.mean_squared_error = loss / 1000;
    report.tokens = 512;
    report.damp_percent = 0.05;
    report.forward_seconds = 1.0;
    report.hessian_seconds = 2.0;
    report.factor_seconds = 4.0;
    report.solve_seconds = 8.0;
    report.io_seconds = 16.0;
    return report;
}

Report two_blocks() {
    Report report;
    report.version = "1.2.3";
    report.libraries = {{"OpenBLAS", "0.3.21"}};
    report.devices = {"n1: CPU", "n2: CPU"};
    report.world_size = 2;
    report.source_bytes = 1000;
    report.output_bytes = 282;
    report.seconds = 130.0;
    for (int block = 0; block < 2; ++block) {
        report.linears.push_back(linear(block, "qkv", "self_attn.q_proj", 128, 128, 1.0 + block));
        report.linears.push_back(linear(block, "qkv", "self_attn.k_proj", 64, 128, 3.0));
        report.linears.push_back(linear(block, "down", "mlp.down_proj", 128, 256, 5.0));
    }
    return report;
}

TEST(Report, CsvHasAHeaderAndALineALinear) {
    auto report = two_blocks();
    report.linears.resize(2);
    report.linears[0].loss = 0.1;
    report.linears[0].error_propagation_alpha = 0.5;
    report.linears[1].module = "odd,\"name\"";
    report.linears[1].loss = std::numeric_limits<double>::quiet_NaN();
    report.linears[1].fallback = fallback_damping;
    EXPECT_EQ(to_csv(report),
              "module,block,group,rows,columns,bits,group_size,loss,mean_squared_error,tokens,damp_percent,"
              "dead_columns,fallback,error_propagation_alpha,"
              "forward_seconds,hessian_seconds,factor_seconds,solve_seconds,io_seconds\n"
              "model.layers.0.self_attn.q_proj,0,qkv,128,128,4,64,0.1,0.001,512,0.05,0,,0.5,1,2,4,8,16\n"
              "\"odd,\"\"name\"\"\",0,qkv,64,128,4,64,nan,0.003,512,0.05,0,damping raised,0,1,2,4,8,16\n");
}

TEST(Report, JsonHoldsEverything) {
    auto report = two_blocks();
    report.warnings = {"asymmetric"};
    report.job_yaml = "model: x\xff";  // not UTF-8
    const auto json = nlohmann::json::parse(to_json(report));
    EXPECT_EQ(json["libraries"]["OpenBLAS"], "0.3.21");
    EXPECT_EQ(json["devices"].size(), 2u);
    EXPECT_EQ(json["warnings"][0], "asymmetric");
    EXPECT_EQ(json["linears"].size(), 6u);
    EXPECT_EQ(json["linears"][3]["module"], "model.layers.1.self_attn.q_proj");
    EXPECT_EQ(json["linears"][3]["loss"], 2.0);
    // Four groups of 1 + 2 + 4 + 8 + 16 seconds, though there are six linears.
    EXPECT_EQ(json["stage_seconds"]["forward"], 4.0);
    EXPECT_EQ(json["stage_seconds"]["hessian"], 8.0);
    EXPECT_EQ(json["stage_seconds"]["factor"], 16.0);
    EXPECT_EQ(json["stage_seconds"]["solve"], 32.0);
    EXPECT_EQ(json["stage_seconds"]["io"], 64.0);
}

TEST(Report, FallbacksAreSummed) {
    auto report = two_blocks();
    report.linears[0].fallback = fallback_damping;
    report.linears[1].fallback = fallback_damping;
    report.linears[1].damp_percent = 0.07;
    report.linears[5].fallback = fallback_rounding;
    for (auto& linear : report.linears)
        if (linear.group == "qkv" && linear.block == 0) linear.dead_columns = 3;  // of one shared input
    const auto totals = count_fallbacks(report);
    EXPECT_EQ(totals.damping_raised, 2);
    EXPECT_EQ(totals.rounded_to_nearest, 1);
    EXPECT_EQ(totals.largest_damp_percent, 0.07);
    EXPECT_EQ(totals.dead_columns, 3);
    const auto text = summary_table(report);
    EXPECT_NE(text.find("damping raised, up to 0.07, in 2 linears: model.layers.0.self_attn.q_proj, "
                        "model.layers.0.self_attn.k_proj\n"),
              std::string::npos)
        << text;
    EXPECT_NE(text.find("rounded to nearest, without GPTQ, 1 linears: model.layers.1.mlp.down_proj\n"),
              std::string::npos);
    EXPECT_NE(text.find("3 input columns were zero"), std::string::npos);
    EXPECT_EQ(text.find("no fallbacks"), std::string::npos);
}

TEST(Report, BitsPerWeightAreThoseOfTheTensors) {
    // 128 x 128 at 4 bits, groups of 64: qweight [16, 128], qzeros [2, 16], scales [2, 128], g_idx [128].
    const double bytes = 16 * 128 * 4 + 2 * 16 * 4 + 2 * 128 * 2 + 128 * 4;
    EXPECT_DOUBLE_EQ(bits_per_weight({linear(0, "o", "o_proj", 128, 128, 0.0)}), bytes * 8 / (128 * 128));
    auto whole_row = linear(0, "o", "o_proj", 32, 96, 0.0);
    whole_row.group_size = -1;
    whole_row.bits = 3;  // qweight [9, 32], qzeros [1, 3], scales [1, 32], g_idx [96]
    EXPECT_DOUBLE_EQ(bits_per_weight({whole_row}), (9 * 32 * 4 + 3 * 4 + 32 * 2 + 96 * 4) * 8.0 / (32 * 96));
    EXPECT_EQ(bits_per_weight({}), 0.0);
}

TEST(Report, SummaryShowsEachKindOnce) {
    EXPECT_EQ(summary_table(two_blocks()),
              "linear     count  bits  mean loss  mean squared error  time\n"
              "q_proj         2     4        1.5           1.500e-03  31 s\n"
              "k_proj         2     4          3           3.000e-03  31 s\n"
              "down_proj      2     4          5           5.000e-03  62 s\n"
              "\n"
              "forward 4.0 s, Hessians 8.0 s, factors 16 s, solving 32 s, reading and writing 64 s; 2.2 min "
              "in all\n"
              "2 ranks in 1 group, propagate: quantized; 0 B between ranks\n"
              "no fallbacks\n"
              "size 282 B of 1.00 kB (28.2%), 4.60 bits a quantized weight\n");
}

TEST(Report, AnEmptyReportIsShownToo) {
    EXPECT_FALSE(summary_table({}).empty());
    EXPECT_EQ(nlohmann::json::parse(to_json({}))["linears"].size(), 0u);
}

}  // namespace
}  // namespace quantmill
