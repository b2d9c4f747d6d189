// Runs one layer of `actzip profile --export stonne DIR` on STONNE, with its real tensors, as sparse
// GEMMs, one a group. In STONNE's folder stonne/, after `make all`:
//
//   g++ -std=c++17 -O2 -Iinclude -Iexternal stonne_layer.cpp \
//     $(find objs -name '*.o' ! -name main.o) -o stonne_layer
//   ./stonne_layer DIR 000_conv1 ../simulation_files/sigma_128mses_128_bw.cfg
//
// The filters (M x K) stay in the array, the patches of the input (K x N) stream by.

#include <cmath>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "Config.h"
#include "STONNEModel.h"
#include "testbench.h"
#include "utility.h"

namespace {

struct Layer {
  unsigned r, s, c, k, g, n, x, y, stride;
};

Layer find(const std::string& dir, const std::string& folder) {
  std::ifstream file(dir + "/layers.csv");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind(folder + ",", 0) != 0) continue;
    std::stringstream rest(line.substr(line.find(',', folder.size() + 1) + 1));
    std::vector<unsigned> v;
    for (std::string cell; std::getline(rest, cell, ',');) v.push_back(std::stoul(cell));
    return {v.at(0), v.at(1), v.at(2), v.at(3), v.at(4), v.at(5), v.at(6), v.at(7), v.at(8)};
  }
  throw std::runtime_error("no layer " + folder + " in " + dir + "/layers.csv");
}

std::vector<float> read(const std::string& path, size_t count) {
  std::vector<float> values(count);
  std::ifstream file(path, std::ios::binary);
  if (!file.read(reinterpret_cast<char*>(values.data()), count * sizeof(float)))
    throw std::runtime_error("cannot read " + path);
  return values;
}

// Runs C = A (m x k) B (k x n) on STONNE; the largest difference from the CPU's.
float gemm(const Config& config, const std::string& name, std::vector<float>& a, std::vector<float>& b,
           unsigned m, unsigned k, unsigned n) {
  unsigned* a_bits = generateBitMapFromDense(a.data(), m, k, GEN_BY_ROWS);
  unsigned* b_bits = generateBitMapFromDense(b.data(), k, n, GEN_BY_COLS);
  float* a_values = generateMatrixSparseFromDense(a.data(), a_bits, m, k, GEN_BY_ROWS);
  float* b_values = generateMatrixSparseFromDense(b.data(), b_bits, k, n, GEN_BY_COLS);
  std::vector<float> out(m * n), want(m * n);
  std::vector<unsigned> out_bits(m * n);
  Stonne stonne(config);
  stonne.loadGEMM(name, n, k, m, a_values, b_values, a_bits, b_bits, out.data(), out_bits.data(),
                  MK_STA_KN_STR);
  stonne.run();
  cpu_gemm(a.data(), b.data(), want.data(), m, n, k);
  float worst = 0;
  for (size_t i = 0; i < out.size(); i++) worst = std::max(worst, std::fabs(out[i] - want[i]));
  return worst;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return std::fprintf(stderr, "stonne_layer DIR LAYER CONFIG\n"), 2;
  const std::string dir = argv[1], folder = argv[2];
  const Layer l = find(dir, folder);
  Config config;
  config.loadFile(argv[3]);
  const unsigned c = l.c / l.g, m = l.k / l.g, k = l.r * l.s * c;
  const unsigned rows = (l.x - l.r) / l.stride + 1, cols = (l.y - l.s) / l.stride + 1;
  const auto ifmap = read(dir + "/" + folder + "/ifmap.f32", size_t(l.x) * l.y * l.c);
  const auto filters = read(dir + "/" + folder + "/filters.f32", size_t(l.k) * k);
  float worst = 0;
  for (unsigned g = 0; g < l.g; g++) {
    std::vector<float> a(filters.begin() + size_t(g) * m * k, filters.begin() + size_t(g + 1) * m * k);
    std::vector<float> b(size_t(k) * rows * cols);
    for (unsigned r = 0; r < l.r; r++)
      for (unsigned s = 0; s < l.s; s++)
        for (unsigned i = 0; i < c; i++)
          for (unsigned y = 0; y < rows; y++)
            for (unsigned x = 0; x < cols; x++) {
              const size_t from = (size_t(y) * l.stride + r) * l.y + x * l.stride + s;
              b[((r * l.s + s) * c + i) * size_t(rows) * cols + y * cols + x] = ifmap[from * l.c + g * c + i];
            }
    worst = std::max(worst, gemm(config, folder + "_g" + std::to_string(g), a, b, m, k, rows * cols));
  }
  std::cout << "largest difference from the CPU: " << worst << std::endl;
  return worst < 1e-2 ? 0 : 1;
}
