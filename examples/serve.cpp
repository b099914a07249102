// Serves a package of AOTInductor without Python. Standard input: histories of item ids, one a line, as long as the
// package was compiled for. Standard output: item:score pairs, best first. LIBRARY is what
// cprec_kernels.serving_library() names.
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <exception>
#include <iostream>
#include <iterator>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

int main(int argc, char** argv) try {
  if (argc != 3) throw std::invalid_argument("usage: serve PACKAGE LIBRARY < histories");
  if (dlopen(argv[2], RTLD_NOW) == nullptr) throw std::runtime_error(dlerror());  // defines the ops
  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  const int64_t length = std::stoll(model.get_metadata().at("length"));  // a package does not check shapes itself

  std::vector<int64_t> ids;
  int64_t rows = 0;
  for (std::string line; std::getline(std::cin, line); ++rows) {
    std::istringstream numbers(line);
    for (int64_t id; numbers >> id;) ids.push_back(id);
    if (std::ssize(ids) != (rows + 1) * length)
      throw std::invalid_argument("line " + std::to_string(rows + 1) + ": not " + std::to_string(length) + " item ids");
  }
  const auto outputs = model.run({at::tensor(ids, at::kLong).view({rows, length})});
  const auto scores = outputs[0].accessor<float, 2>();
  const auto items = outputs[1].accessor<int64_t, 2>();
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < items.size(1); ++i)
      std::printf("%lld:%.9g%c", static_cast<long long>(items[row][i]), scores[row][i],
                  i + 1 < items.size(1) ? ' ' : '\n');
  return 0;
} catch (const std::exception& error) {
  std::cerr << "serve: " << error.what() << '\n';
  return 1;
}
