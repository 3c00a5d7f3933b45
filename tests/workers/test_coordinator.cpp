#include <gtest/gtest.h>

#include "workers/coordinator.h"

namespace quantmill {
namespace {

RankState working(const std::string& host, const std::string& doing) {
    RankState state;
    state.host = host;
    state.doing = doing;
    return state;
}

TEST(FindStall, NamesTheRankThatNeitherWorksNorWaits) {
    std::vector<RankState> states{working("a", "streaming"), working("b", "block 3 qkv: solving rows")};
    EXPECT_EQ(find_stall(states, 10.0), "");
    states[1].idle = 7.0;  // as it said itself, and nothing has been heard since
    states[1].silent = 2.0;
    EXPECT_EQ(find_stall(states, 10.0), "");
    states[1].silent = 4.0;
    const std::string stall = find_stall(states, 10.0);
    EXPECT_NE(stall.find("rank 1 on b has stalled: no sign of life for 11 s"), std::string::npos) << stall;
    EXPECT_NE(stall.find("Last seen: block 3 qkv: solving rows"), std::string::npos) << stall;
}

TEST(FindStall, WaitingIsNoStallUnlessAllWait) {
    std::vector<RankState> states{working("a", "one"), working("b", "two")};
    states[0].unchanged = 50.0;  // it waits for the other: idle stays small
    EXPECT_EQ(find_stall(states, 10.0), "");
    states[1].unchanged = 11.0;
    const std::string stall = find_stall(states, 10.0);
    EXPECT_NE(stall.find("all ranks wait for each other"), std::string::npos) << stall;
    EXPECT_NE(stall.find("rank 0 on a: one"), std::string::npos) << stall;
    EXPECT_NE(stall.find("rank 1 on b: two"), std::string::npos) << stall;
}

TEST(FindStall, ASilentRankIsNotOneThatWaits) {
    std::vector<RankState> states{working("a", "writing"), working("b", "solving rows")};
    states[0].unchanged = 11.0;
    states[1].unchanged = 1.0;
    states[1].silent = 9.5;  // stopped: what it would say is not known
    EXPECT_EQ(find_stall(states, 10.0), "");
    states[1].silent = 10.5;
    EXPECT_NE(find_stall(states, 10.0).find("rank 1 on b has stalled"), std::string::npos);
}

TEST(ProgressText, ShowsTheSlowestRankOfEachGroup) {
    std::vector<RankState> states;
    for (const double done : {0.5, 0.4, 0.1, 0.2}) {
        states.push_back(working("host", "at " + std::to_string(static_cast<int>(100 * done))));
        states.back().done = done;
    }
    states[2].group = states[3].group = 1;
    EXPECT_EQ(progress_text(states), " 30%  group 0 40% at 40  group 1 10% at 10");
    for (RankState& state : states) state.group = 0;
    EXPECT_EQ(progress_text(states), " 30%  at 10");
    states.assign(40, states[0]);
    for (int group = 0; group < 40; ++group) states[static_cast<std::size_t>(group)].group = group;
    const std::string text = progress_text(states);  // the first ones and the last
    EXPECT_NE(text.find("group 2 "), std::string::npos) << text;
    EXPECT_EQ(text.find("group 3 "), std::string::npos) << text;
    EXPECT_NE(text.find("group 39 "), std::string::npos) << text;
}

TEST(Coordinator, OfOneProcessNeedsNoMessages) {
    const auto control = make_lone_control();
    Coordinator coordinator(*control, 1.0, false);
    coordinator.report("working", 0.5);
    coordinator.finish();
}

}  // namespace
}  // namespace quantmill
