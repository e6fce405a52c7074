// Scores an image with an exported detector and ONNX Runtime.
//
//   score MODEL.onnx IMAGE.ppm MAP.pgm
//
// The model was exported with --resize=inside. The image is a binary PPM file (P6) of 8 bits. Prints
// the score, the p-value and the decision, and writes the anomaly map as PGM: 0 is its lowest value,
// 255 its highest one.

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

struct Image {
  int64_t width = 0, height = 0;
  std::vector<uint8_t> rgb;  // [height, width, 3]
};

Image read_ppm(const std::string& file) {
  std::ifstream stream(file, std::ios::binary);
  std::string magic;
  Image image;
  int maximum = 0;
  stream >> magic >> image.width >> image.height >> maximum;
  stream.get();  // one space ends the header
  if (!stream || magic != "P6" || maximum != 255 || image.width < 1 || image.height < 1 ||
      image.width > 65535 || image.height > 65535)
    throw std::runtime_error(file + " is not a binary PPM file (P6) of 8 bits without comments.");
  image.rgb.resize(image.width * image.height * 3);
  if (!stream.read(reinterpret_cast<char*>(image.rgb.data()), image.rgb.size()))
    throw std::runtime_error(file + " is truncated.");
  return image;
}

void write_pgm(const std::string& file, const float* map, const Image& image) {
  const size_t size = image.width * image.height;
  const auto [low, high] = std::minmax_element(map, map + size);
  const float range = std::max(*high - *low, 1e-12f);
  std::ofstream stream(file, std::ios::binary);
  stream << "P5\n" << image.width << ' ' << image.height << "\n255\n";
  for (size_t i = 0; i < size; i++)
    stream.put(static_cast<char>(255 * (map[i] - *low) / range + 0.5f));
  stream.close();
  if (!stream) throw std::runtime_error(file + " cannot be written.");
}

std::map<std::string, Ort::Value> run(const std::string& model, Image& image) {
  Ort::Env env(ORT_LOGGING_LEVEL_ERROR, "score");
  Ort::Session session(env, std::filesystem::path(model).c_str(), Ort::SessionOptions());
  Ort::AllocatorWithDefaultOptions allocator;
  std::vector<std::string> names;  // the last three are missing if the detector has no threshold
  for (size_t i = 0; i < session.GetOutputCount(); i++)
    names.push_back(session.GetOutputNameAllocated(i, allocator).get());
  std::vector<const char*> outputs;
  for (const std::string& name : names) outputs.push_back(name.c_str());
  const std::vector<int64_t> shape{1, image.height, image.width, 3};
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  const Ort::Value input = Ort::Value::CreateTensor<uint8_t>(
      memory, image.rgb.data(), image.rgb.size(), shape.data(), shape.size());
  const char* input_name = "images";
  auto values = session.Run(Ort::RunOptions(), &input_name, &input, 1, outputs.data(), outputs.size());
  std::map<std::string, Ort::Value> results;
  for (size_t i = 0; i < names.size(); i++) results.emplace(names[i], std::move(values[i]));
  return results;
}

int main(int argc, char** argv) try {
  if (argc != 4) throw std::runtime_error("Usage: score MODEL.onnx IMAGE.ppm MAP.pgm");
  Image image = read_ppm(argv[2]);
  auto results = run(argv[1], image);
  std::cout << "score " << *results.at("score").GetTensorData<float>() << '\n';
  if (results.count("p_value"))
    std::cout << "p_value " << *results.at("p_value").GetTensorData<float>() << '\n';
  if (results.count("is_anomalous"))
    std::cout << (*results.at("is_anomalous").GetTensorData<bool>() ? "anomalous" : "normal") << '\n';
  write_pgm(argv[3], results.at("anomaly_map").GetTensorData<float>(), image);
  return EXIT_SUCCESS;
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << '\n';
  return EXIT_FAILURE;
}
