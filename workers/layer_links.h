#pragma once

#include <memory>
#include <string>
#include <vector>

#include "workers/group_solver.h"
#include "workers/layer_plan.h"

namespace quantmill {

// The way to a neighbouring group, for the hidden states of each batch shard.
struct Link {
    Communicator* communicator = nullptr;  // none: no such neighbour
    std::vector<int> peers;                // [shard]: who owns it over there, a rank of the communicator
};

// The communicators of one rank in a LayerPlan: its group, and the groups before and after it. Each link has
// a communicator of its own, so that what comes in never waits for what goes out.
class LayerLinks {
public:
    // `kind`: compute.communicator. Collective.
    LayerLinks(Control& control, Backend& backend, const std::string& kind, const LayerPlan& plan,
               std::size_t shards);

    Team group() { return {*group_.control, *group_.communicator}; }
    const Link& previous() const { return previous_; }
    const Link& next() const { return next_; }
    // Between the last group and the first, when there is another sweep.
    const Link& around() const { return around_; }

private:
    struct Channel {
        std::unique_ptr<Control> control;
        std::unique_ptr<Communicator> communicator;
    };

    // Joins the ranks of this rank's group with those of group `other`, none when it does not exist.
    // Hidden states will go there or come from there.
    Link join(Control& control, const LayerPlan& plan, int other, bool sends, int color, std::size_t shards);
    Channel open(std::unique_ptr<Control> control) const;

    Backend& backend_;
    std::string kind_;
    int own_, index_;  // its group, and its place there
    Channel group_;
    std::vector<Channel> channels_;
    Link previous_, next_, around_;
};

// A communicator for these ranks; a single rank needs no library for it.
std::unique_ptr<Communicator> make_team_communicator(const std::string& kind, Control& control,
                                                     Backend& backend);

}  // namespace quantmill
