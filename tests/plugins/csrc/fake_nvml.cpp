// A stand-in for libnvidia-ml.so.1 that knows one GPU.
#include <cstring>

extern "C" {

int nvmlInit_v2() { return 0; }
int nvmlShutdown() { return 0; }
int nvmlDeviceGetHandleByPciBusId_v2(char const* bus, void** device) {
    static int gpu = 0;
    *device = &gpu;
    return std::strcmp(bus, "0000:01:00.0") == 0 ? 0 : 6;
}
int nvmlDeviceGetClockInfo(void*, int type, unsigned* mhz) { *mhz = type == 1 ? 1980 : 2619; return type == 1 || type == 2 ? 0 : 2; }
int nvmlDeviceGetPowerUsage(void*, unsigned* milliwatts) { *milliwatts = 123456; return 0; }
int nvmlDeviceGetTemperature(void*, int, unsigned* celsius) { *celsius = 41; return 0; }

}  // extern "C"
