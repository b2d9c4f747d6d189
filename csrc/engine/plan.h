// Plan: a network as the executor runs it. Built once from values and nodes, then immutable.
//
//   PlanBuilder b;
//   int x = b.value({...}); int y = b.value({...});
//   b.node({"conv", "layer1.conv1", {x}, y, {{"stride", {1, 1}}}, {}, {{"weight", w}}, {}});
//   b.input(x); b.output(y);
//   std::unique_ptr<Plan> plan = b.build();
//   plan->run(batch, inputs, outputs, threads);
//
// Values. Shapes are logical: maps are (N, C, H, W). A size marked `batch` is multiplied by N, the batch of
// the run. Layout `plain`: row-major float32. Layout `map`: NHWC float32, rank 4. Layout `packed`:
// kernels/packed.h, rank 4. A value with a `parent` has no memory of its own: it is `channels` of that value
// from `offset` on (a parent of layout map or packed: channels of dimension 1; plain: `offset` must be 0 and
// the sizes equal, another shape for the same memory). Inputs and outputs are plain, without parent; the
// caller's memory is used directly. Constants are plain values with data.
//
// Memory. Per batch size and number of threads there is a context: one arena in which every value that is not
// the caller's lies, and every node's scratch, placed by liveness, and the packed maps. The output of a
// convolution takes over its residual's place, where nobody else reads that afterwards; a packed one where
// that makes the arena smaller, for then every segment has the place that it would have dense. Scratch is
// less than kernels would like where that is what the arena's size hangs on. Contexts are made on first use
// and kept (at most kMaxContexts idle ones); concurrent runs use one each. A packed map's value region is
// sized by its calibrated `density` with some room; a run with more non-zeros takes more from the heap
// (spill).
//
// Threads. Where no node lets images of a batch meet, and there is one for each thread at least, a thread
// takes a share of some images through all nodes, in a context of their own, then the next. Otherwise threads
// share each node. The result is the same, bit for bit.
//
// Subnormal numbers count as zero inside a run (common/float_mode.h); the caller's floating-point mode is as
// before afterwards.
//
// Errors: std::invalid_argument for a plan or arguments that do not fit, std::bad_alloc.
//
// Nodes: docs/engine.md lists every operator with its attributes.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "common/cpu.h"
#include "kernels/packed.h"
#include "kernels/weight_store.h"

namespace actzip::engine {

enum class Layout : int { plain = 0, map = 1, packed = 2 };

struct ValueSpec {
  std::string name;
  std::vector<int64_t> dims;
  std::vector<bool> batch;  // per dimension: times N
  Layout layout = Layout::plain;
  int parent = -1;
  int64_t offset = 0;
  std::vector<int64_t> parts;  // packed without parent: channels of its producers in order; empty: one
  ValueType type = ValueType::f32;
  // u8 and u16: the quantizer's scale and greatest integer (see ChannelBlock), one of each or one a part;
  // tops may be empty: what the type holds.
  std::vector<float> scales, tops;
  double density = 1.0;
  // Layout map: memory for so many rows of one image only. Such a value is what a conv_pool node pools.
  int64_t band = 0;
  std::vector<float> data;  // constants
};

// Numbers of somebody else's, who keeps them unchanged for as long as there is a copy of `owner`.
struct Borrowed {
  const float* data = nullptr;
  size_t size = 0;
  std::shared_ptr<const void> owner;
};

struct NodeSpec {
  std::string op;
  std::string name;
  std::vector<int> inputs;
  int output = -1;
  std::map<std::string, std::vector<int64_t>> ints;
  std::map<std::string, std::vector<double>> floats;
  std::map<std::string, std::vector<float>> arrays;
  std::map<std::string, Borrowed> borrowed;  // weights, which nodes pack: no copy between
  std::map<std::string, std::string> strings;
  WeightStore* store = nullptr;  // where packed weights are kept: under strings["weights"], else the name
};

struct NodeTiming {
  std::string op, name, kernel, kind;
  double seconds = 0;  // of the last run
};

struct NodeMemory {
  std::string name;
  size_t values = 0, scratch = 0;  // bytes of what is read or kept for later, and of all workers' scratch
};

class Node;
struct Context;

inline constexpr size_t kMaxContexts = 8;

class Plan {
 public:
  ~Plan();
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  // inputs[i], outputs[i]: memory of the plain inputs and outputs in the order they were declared, of the
  // sizes that `shape` says. threads <= 0: default_threads(). Safe from several threads at once.
  void run(int64_t batch, const std::vector<const float*>& inputs, const std::vector<float*>& outputs,
           int threads) const;
  // run, with the time of every node: that of the first share of images, times how many a thread has.
  std::vector<NodeTiming> profile(int64_t batch, const std::vector<const float*>& inputs,
                                  const std::vector<float*>& outputs, int threads) const;
  // run, with the share of non-zeros of every value that a node writes (index: value), -1 for the others.
  std::vector<double> densities(int64_t batch, const std::vector<const float*>& inputs,
                                const std::vector<float*>& outputs, int threads) const;

  // run, with the content of `values`, which must be maps (Layout::map, packed) that a node reads, as its
  // first reader finds it: N x H x W x C.
  std::vector<std::vector<float>> capture(int64_t batch, const std::vector<const float*>& inputs,
                                          const std::vector<float*>& outputs, int threads,
                                          const std::vector<int>& values) const;

  std::vector<int64_t> shape(int value, int64_t batch) const;
  const std::vector<int>& inputs() const { return inputs_; }
  const std::vector<int>& outputs() const { return outputs_; }
  // Bytes of the arenas of a run, scratch included; the most heap that packed maps have spilled to so far.
  size_t arena_bytes(int64_t batch, int threads) const;
  // What each node needs of one arena while it runs.
  std::vector<NodeMemory> memory(int64_t batch, int threads) const;
  size_t weight_bytes() const;
  size_t spilled_bytes() const;
  // Frees the idle contexts.
  void release() const;

 private:
  friend class PlanBuilder;
  Plan() = default;
  std::unique_ptr<Context> acquire(int64_t batch, int threads) const;
  std::unique_ptr<Context> make_context(int64_t batch, int threads) const;
  bool in_arena(size_t value) const;
  void take_over(size_t node);
  void set_view(Context& c, size_t value) const;
  // A part of an arena, and while which nodes run it is used.
  struct Piece {
    size_t size;
    int first, last;
    size_t* offset_of;  // what wants to know where it is
    size_t offset = 0;
  };
  std::unique_ptr<Context> lay_out(int64_t batch, int threads, std::vector<Piece>* pieces) const;
  std::vector<Piece> value_pieces(Context& c) const;
  std::vector<size_t> live(const std::vector<Piece>& pieces) const;
  void choose_slots(Context& c) const;
  void set_scratch(Context& c, size_t limit) const;
  void limit_scratch(Context& c) const;
  static size_t place(std::vector<Piece>& pieces, const std::vector<size_t>& order);
  size_t place(std::vector<Piece>& pieces) const;
  void place_operands(Context& c, const std::vector<const float*>& inputs,
                      const std::vector<float*>& outputs) const;
  void check_call(int64_t batch, const std::vector<const float*>& inputs,
                  const std::vector<float*>& outputs) const;
  static int64_t share_of(size_t weight_bytes);
  // Images of a share, and how many shares; none where the threads share each node.
  struct Shares {
    int64_t images = 0, count = 0;
  };
  Shares shares(int64_t batch, int threads) const;
  void run_in_shares(int64_t batch, const std::vector<const float*>& inputs,
                     const std::vector<float*>& outputs, int threads, std::vector<NodeTiming>* timings) const;
  void give_back(std::unique_ptr<Context> context) const;
  void execute(Context& c, const std::vector<const float*>& inputs, const std::vector<float*>& outputs,
               std::vector<NodeTiming>* timings, std::vector<double>* densities,
               std::map<int, std::vector<float>>* captured = nullptr) const;

  Isa isa_ = Isa::baseline;
  std::vector<ValueSpec> values_;
  std::vector<int> roots_;    // value -> the value whose memory it lies in
  std::vector<int64_t> ats_;  // value -> first channel in its root
  std::vector<std::unique_ptr<Node>> nodes_;
  std::vector<std::vector<int>> binds_;  // node -> packed roots that it is the first to write
  std::vector<int> first_, last_;        // root -> first and last node that touch it
  std::vector<int> heir_of_;             // root -> the root in whose memory it lies instead; -1
  std::vector<int> slot_heir_of_;        // packed root -> the one in whose memory its segments may lie; -1
  std::vector<int> inputs_, outputs_;
  int64_t share_ = 0;  // most images of one; 0: images of a batch meet
  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<Context>> idle_;
  mutable size_t spilled_ = 0;
  mutable std::atomic<int> most_threads_{1};  // that were asked for so far
};

class PlanBuilder {
 public:
  // Packed weights are kept in `store` (null: by the plan) and found there.
  explicit PlanBuilder(std::shared_ptr<WeightStore> store = nullptr) : store_(std::move(store)) {}
  int value(ValueSpec spec);
  void node(NodeSpec spec);
  void input(int value);
  void output(int value);
  // Checks the whole and packs the weights; `packed(i)` when those of node i are. The builder is empty
  // afterwards.
  std::unique_ptr<Plan> build(const std::function<void(size_t)>& packed = {});

 private:
  const ValueSpec& known(int64_t value, const std::string& who) const;
  void find_root(size_t value, Plan* plan) const;
  void check_inputs(std::vector<bool>* written) const;
  void check_node(size_t node, std::vector<bool>* written, Plan* plan) const;
  void check_outputs(const Plan& plan) const;
  bool images_apart() const;

  std::shared_ptr<WeightStore> store_;
  std::vector<ValueSpec> values_;
  std::vector<NodeSpec> nodes_;
  std::vector<int> inputs_, outputs_;
};

// Operators of nodes, and elementwise functions (strings["act"]) but for `none`.
std::vector<std::string> operator_names();
std::vector<std::string> activation_names();

// Names of the kernel variants that can run the convolution `spec` (op "conv" or "linear") between values of
// these specs, most promising first.
std::vector<std::string> node_variants(const NodeSpec& spec, const std::vector<ValueSpec>& values);

}  // namespace actzip::engine
