// Holds docs/job-spec.md and jobs/examples against the parser, so that neither can drift.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <sstream>

#include "jobs/job_spec.h"
#include "jobs/report.h"
#include "kernels/error.h"

namespace quantmill {
namespace {

namespace fs = std::filesystem;

const fs::path source = QUANTMILL_SOURCE_DIR;

std::string manual() {
    std::ifstream file(source / "docs/job-spec.md");
    std::ostringstream text;
    text << file.rdbuf();
    return text.str();
}

// Cells of a Markdown table row, without backticks and with \| as |. Empty for other lines.
std::vector<std::string> cells_of(const std::string& line) {
    if (!line.starts_with("| ")) return {};
    std::vector<std::string> cells(1);
    for (std::size_t i = 2; i < line.size(); ++i) {
        if (line[i] == '\\' && i + 1 < line.size() && line[i + 1] == '|')
            cells.back() += line[++i];
        else if (line[i] == '|')
            cells.emplace_back();
        else if (line[i] != '`')
            cells.back() += line[i];
    }
    for (auto& cell : cells) {
        cell.erase(0, cell.find_first_not_of(' '));
        cell.erase(cell.find_last_not_of(' ') + 1);
    }
    cells.pop_back();  // after the last |
    return cells;
}

// Rows of all tables whose header begins with these two cells.
std::vector<std::vector<std::string>> rows_below(const std::string& first, const std::string& second) {
    std::vector<std::vector<std::string>> rows;
    std::istringstream lines(manual());
    bool inside = false;
    for (std::string line; std::getline(lines, line);) {
        if (line.starts_with("|---")) continue;
        const auto cells = cells_of(line);
        if (cells.size() >= 2 && cells[0] == first && cells[1] == second)
            inside = true;
        else if (cells.empty())
            inside = false;
        else if (inside)
            rows.push_back(cells);
    }
    return rows;
}

TEST(JobSpecDocs, TablesAndParserHaveTheSameKeys) {
    std::map<std::string, std::vector<std::string>> documented;
    for (const auto& row : rows_below("Key", "Values")) {
        ASSERT_EQ(row.size(), 5u) << row[0];
        EXPECT_TRUE(documented.emplace(row[0], row).second) << row[0] << " is documented twice";
        EXPECT_FALSE(row[3].empty()) << row[0] << " has no meaning";
    }
    for (const auto& key : job_keys()) {
        ASSERT_TRUE(documented.contains(key.path)) << key.path << " is not in docs/job-spec.md";
        EXPECT_EQ(documented[key.path][1], key.values) << key.path;
        EXPECT_EQ(documented[key.path][2], key.default_value) << key.path;
        documented.erase(key.path);
    }
    for (const auto& [key, row] : documented) ADD_FAILURE() << key << " is documented, but no key";
}

TEST(JobSpecDocs, ExitCodesAreTheProgramsOwn) {
    std::map<std::string, std::string> documented;
    for (const auto& row : rows_below("Code", "Name")) documented[row[0]] = row[1];
    const std::map<std::string, std::string> expected = {
        {std::to_string(static_cast<int>(ExitCode::ok)), "done"},
        {std::to_string(static_cast<int>(ExitCode::bad_input)), "bad input"},
        {std::to_string(static_cast<int>(ExitCode::internal)), "internal error"},
        {std::to_string(static_cast<int>(ExitCode::infrastructure)), "infrastructure fault"},
        {std::to_string(static_cast<int>(ExitCode::stopped)), "stopped"}};
    EXPECT_EQ(documented, expected);
}

TEST(JobSpecDocs, ReportColumnsAreDocumentedInOrder) {
    std::string columns;
    for (const auto& row : rows_below("Column", "Meaning")) columns += (columns.empty() ? "" : ", ") + row[0];
    std::string header = to_csv({});
    header.pop_back();
    for (std::size_t at = 0; (at = header.find(',', at)) != std::string::npos; at += 2)
        header.insert(at + 1, " ");
    EXPECT_EQ(columns, header);
}

TEST(JobSpecDocs, JobsInTheManualParse) {
    const auto text = manual();
    int jobs = 0;
    for (std::size_t at = 0; (at = text.find("```yaml\n", at)) != std::string::npos; ++jobs) {
        at += 8;
        const auto job = text.substr(at, text.find("```", at) - at);
        EXPECT_NO_THROW(parse_job_spec(job, "docs/job-spec.md", {})) << job;
    }
    EXPECT_EQ(jobs, 5);
}

TEST(JobSpecDocs, ExamplesParse) {
    std::map<std::string, JobSpec> specs;
    for (const auto& entry : fs::directory_iterator(source / "jobs/examples"))
        EXPECT_NO_THROW(specs[entry.path().filename()] = load_job_spec(entry.path(), {})) << entry.path();
    ASSERT_EQ(specs.size(), 3u);
    EXPECT_EQ(specs.at("demo-smollm2.yaml").quantization.group_size, 64);
    EXPECT_EQ(specs.at("llama-3-8b-w4g128.yaml").quantization.group_size, 128);
    EXPECT_EQ(specs.at("llama-3-70b-w4g128.yaml").output.tensor_parallel, 4);
}

}  // namespace
}  // namespace quantmill
