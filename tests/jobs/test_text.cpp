#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "jobs/text.h"

namespace quantmill {
namespace {

TEST(Text, BytesHaveThreeDigitsAndDecimalUnits) {
    EXPECT_EQ(bytes_text(0), "0 B");
    EXPECT_EQ(bytes_text(999), "999 B");
    EXPECT_EQ(bytes_text(1000), "1.00 kB");
    EXPECT_EQ(bytes_text(9'960'000), "9.96 MB");
    EXPECT_EQ(bytes_text(39'800'000'000), "39.8 GB");
    EXPECT_EQ(bytes_text(141'100'000'000), "141 GB");
    EXPECT_EQ(bytes_text(999'600'000'000), "1.00 TB");  // never "1000 GB"
    EXPECT_EQ(bytes_text(18'000'000'000'000'000'000ULL), "18000 PB");
}

TEST(Text, Counts) {
    EXPECT_EQ(count_text(960), "960");
    EXPECT_EQ(count_text(134'515'008), "135 M");
    EXPECT_EQ(count_text(70'553'706'496), "70.6 B");
}

TEST(Text, SecondsUseTheUnitThatPeopleWould) {
    EXPECT_EQ(seconds_text(0.0), "0 ms");
    EXPECT_EQ(seconds_text(0.0804), "80 ms");
    EXPECT_EQ(seconds_text(4.2), "4.2 s");
    EXPECT_EQ(seconds_text(75.0), "75 s");
    EXPECT_EQ(seconds_text(150.0), "2.5 min");
    EXPECT_EQ(seconds_text(720.0), "12 min");
    EXPECT_EQ(seconds_text(3599.0), "1 h 00 min");
    EXPECT_EQ(seconds_text(11'100.0), "3 h 05 min");
}

TEST(Text, Spans) {
    EXPECT_EQ(spans_text({}), "-");
    EXPECT_EQ(spans_text({7}), "7");
    EXPECT_EQ(spans_text({5, 0, 2, 1}), "0-2,5");
    EXPECT_EQ(spans_text({1, 3, 4}), "1,3-4");
}

TEST(Text, TablesAlignAlsoNonAscii) {
    EXPECT_EQ(table_text({{"a", "bb"}, {"c…d", "1"}}, "lr", 1),
              " a    bb\n"
              " c…d   1\n");
}

// The recursive definition, without any table.
std::size_t distance_by_definition(std::string_view a, std::string_view b) {
    if (a.empty() || b.empty()) return a.size() + b.size();
    const auto rest_a = a.substr(1), rest_b = b.substr(1);
    if (a[0] == b[0]) return distance_by_definition(rest_a, rest_b);
    return 1 + std::min({distance_by_definition(rest_a, b), distance_by_definition(a, rest_b),
                         distance_by_definition(rest_a, rest_b)});
}

TEST(Text, EditDistanceEqualsItsDefinition) {
    const auto seed = std::random_device{}();
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    std::mt19937 random(seed);
    const auto word = [&random] {
        std::string letters(random() % 7, ' ');
        for (auto& letter : letters) letter = static_cast<char>('a' + random() % 3);
        return letters;
    };
    for (int i = 0; i < 300; ++i) {
        const auto a = word(), b = word();
        ASSERT_EQ(edit_distance(a, b), distance_by_definition(a, b)) << a << " and " << b;
    }
}

TEST(Text, NearestWordIsNoneWhenNothingIsClose) {
    const std::vector<std::string> known = {"run", "plan", "eval", "inspect"};
    EXPECT_EQ(nearest_word("inspekt", known), "inspect");
    EXPECT_EQ(nearest_word("rum", known), "run");
    EXPECT_EQ(nearest_word("quantize", known), std::nullopt);
}

}  // namespace
}  // namespace quantmill
