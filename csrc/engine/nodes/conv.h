// Internal: nodes that run a convolution kernel.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "engine/nodes/node_act.h"
#include "kernels/conv.h"

namespace actzip::engine {

// What the kernel of a node computes, but for its activation.
ConvProblem map_problem(const NodeSpec& s, const Values& values);
ConvProblem linear_problem(const NodeSpec& s, const Values& values);
// Gives the kernel the activation where it can do it.
void fuse(const NodeAct& act, ConvProblem* p);

// A kernel, and the activation that it cannot do after it.
class KernelNode : public Node {
 public:
  void weights(Weights* found) const override { (*found)[conv_->weights()] = conv_->weight_bytes(); }
  std::string kernel() const override { return conv_->kernel().name; }
  std::string kind() const override { return conv_->kernel().kind; }
  size_t scratch(const Context& c, int threads) const override {
    return conv_->scratch_bytes(args(c, out(c)), threads);
  }
  void run(Context& c, int threads) const override { run_part(c, args(c, out(c)), threads); }
  // `worker`: the thread that runs all of it alone, with its scratch; -1: `threads` together.
  void run_part(Context& c, const ConvArgs& a, int threads, int worker = -1) const;
  int in_place() const override { return spec.inputs.size() > 1 ? 1 : -1; }  // the residual

  // The operands of a run whose output is `y`.
  virtual ConvArgs args(const Context& c, const View& y) const = 0;
  const Conv& conv() const { return *conv_; }

 protected:
  KernelNode(NodeSpec s, const Values& values, Isa isa, ConvProblem p);

 private:
  void activate(const ConvArgs& a, const ConvPart& part) const;

  const Rows& rows_;
  NodeAct act_;
  bool later_ = false;
  std::unique_ptr<Conv> conv_;
};

std::unique_ptr<KernelNode> make_conv_kernel(NodeSpec s, const Values& values, Isa isa);

}  // namespace actzip::engine
