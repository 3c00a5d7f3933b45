#pragma once

namespace quantmill {

// Something on its way between two ranks. What it moves must live and stay as it is until wait() has
// returned or the transfer is destroyed. One that is destroyed unfinished belongs to a job that is ending: a
// receive is withdrawn, a send may deliver anything.
class Transfer {
public:
    Transfer() = default;
    virtual ~Transfer() = default;
    Transfer(const Transfer&) = delete;
    Transfer& operator=(const Transfer&) = delete;

    virtual bool done() = 0;  // never blocks
    virtual void wait() = 0;
};

}  // namespace quantmill
