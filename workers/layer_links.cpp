#include "workers/layer_links.h"

#include <algorithm>
#include <set>

namespace quantmill {
namespace {

// The ranks of the job that a link joins, in the order of its communicator.
std::vector<int> joined(const LayerPlan& plan, int one, int other) {
    std::vector<int> ranks = plan.groups[static_cast<std::size_t>(one)];
    const auto& more = plan.groups[static_cast<std::size_t>(other)];
    ranks.insert(ranks.end(), more.begin(), more.end());
    std::sort(ranks.begin(), ranks.end());
    return ranks;
}

std::vector<int> peers_of(const LayerPlan& plan, int own, int other, std::size_t shards) {
    const std::vector<int> ranks = joined(plan, own, other);
    const std::vector<int>& group = plan.groups[static_cast<std::size_t>(other)];
    std::vector<int> peers;
    for (std::size_t shard = 0; shard < shards; ++shard) {
        const int owner = group[static_cast<std::size_t>(shard_owner(shard, group.size()))];
        peers.push_back(static_cast<int>(std::find(ranks.begin(), ranks.end(), owner) - ranks.begin()));
    }
    return peers;
}

}  // namespace

std::unique_ptr<Communicator> make_team_communicator(const std::string& kind, Control& control,
                                                     Backend& backend) {
    return make_communicator(control.size() == 1 ? "mpi" : kind, control, backend);
}

LayerLinks::LayerLinks(Control& control, Backend& backend, const std::string& kind, const LayerPlan& plan,
                       std::size_t shards)
    : backend_(backend),
      kind_(kind),
      own_(plan.group_of(control.rank())),
      index_(plan.index_of(control.rank())),
      group_(open(control.split(own_))) {
    group_.communicator->connect({}, {});
    if (!plan.streams) return;
    const auto last = static_cast<int>(plan.groups.size()) - 1;
    // Groups 0-1, 2-3, … first, then 1-2, 3-4, …: every rank takes part in both rounds.
    const int even = own_ % 2 == 0 ? own_ + 1 : own_ - 1;
    const int odd = own_ % 2 == 0 ? own_ - 1 : own_ + 1;
    Link one = join(control, plan, even <= last ? even : -1, even > own_, own_ / 2, shards);
    Link other = join(control, plan, odd <= last ? odd : -1, odd > own_, (own_ + 1) / 2, shards);
    if (own_ % 2 != 0) std::swap(one, other);
    next_ = std::move(one);
    previous_ = std::move(other);
    if (last > 0 && plan.sweeps.size() > 1) {
        const bool at_end = own_ == 0 || own_ == last;
        around_ = join(control, plan, at_end ? last - own_ : -1, own_ == last, at_end ? 0 : own_ + 1, shards);
    }
}

LayerLinks::Channel LayerLinks::open(std::unique_ptr<Control> control) const {
    Channel channel{std::move(control), nullptr};
    channel.communicator = make_team_communicator(kind_, *channel.control, backend_);
    return channel;
}

Link LayerLinks::join(Control& control, const LayerPlan& plan, int other, bool sends, int color,
                      std::size_t shards) {
    std::unique_ptr<Control> part = control.split(color);
    if (other < 0) return {};
    channels_.push_back(open(std::move(part)));
    Link link{channels_.back().communicator.get(), peers_of(plan, own_, other, shards)};
    const std::size_t group_size = plan.groups[static_cast<std::size_t>(own_)].size();
    std::set<int> met;
    for (std::size_t shard = 0; shard < shards; ++shard) {
        if (shard_owner(shard, group_size) == index_) met.insert(link.peers[shard]);
    }
    const std::vector<int> peers(met.begin(), met.end()), none;
    link.communicator->connect(sends ? peers : none, sends ? none : peers);
    return link;
}

}  // namespace quantmill
