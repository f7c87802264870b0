// The Python module of the host: imports extension modules for macOS, and returns what the
// stand-ins have recorded.

#include <Python.h>

#include <string>

#include "gpu_link.h"
#include "image.h"
#include "metal.h"
#include "objc.h"
#include "programs.h"
#include "stand_ins.h"
#include "variadic.h"

namespace macho {

// -- CPython's functions with variadic arguments, as code for macOS calls them.

extern "C" {

__attribute__((used)) PyObject* macho_PyErr_Format(PyObject* type, const char* format,
                                                   void* stack) {
  va_list arguments;
  read_arguments(&arguments, stack);
  return PyErr_FormatV(type, format, arguments);
}

__attribute__((used)) int macho_PyErr_WarnFormat(PyObject* category, Py_ssize_t level,
                                                 const char* format, void* stack) {
  va_list arguments;
  read_arguments(&arguments, stack);
  PyObject* text = PyUnicode_FromFormatV(format, arguments);
  if (text == nullptr) return -1;
  const int result = PyErr_WarnEx(category, PyUnicode_AsUTF8(text), level);
  Py_DECREF(text);
  return result;
}

__attribute__((used)) PyObject* macho_PyUnicode_FromFormat(const char* format, void* stack) {
  va_list arguments;
  read_arguments(&arguments, stack);
  return PyUnicode_FromFormatV(format, arguments);
}

__attribute__((used)) PyObject* macho_Py_BuildValue(const char* format, void* stack) {
  va_list arguments;
  read_arguments(&arguments, stack);
  return Py_VaBuildValue(format, arguments);
}

__attribute__((used)) PyObject* macho_PyTuple_Pack(Py_ssize_t count, PyObject** stack) {
  PyObject* tuple = PyTuple_New(count);
  if (tuple == nullptr) return nullptr;
  for (Py_ssize_t i = 0; i < count; ++i) PyTuple_SET_ITEM(tuple, i, Py_NewRef(stack[i]));
  return tuple;
}

}  // extern "C"

VARIADIC(macho_variadic_PyErr_Format, 2, macho_PyErr_Format);
VARIADIC(macho_variadic_PyErr_WarnFormat, 3, macho_PyErr_WarnFormat);
VARIADIC(macho_variadic_PyUnicode_FromFormat, 1, macho_PyUnicode_FromFormat);
VARIADIC(macho_variadic_Py_BuildValue, 1, macho_Py_BuildValue);
VARIADIC(macho_variadic_PyTuple_Pack, 1, macho_PyTuple_Pack);

namespace {

PyObject* format_list(PyObject* type, const char* format, void* list) {
  return macho_PyErr_Format(type, format, list);
}

const StandIns kPython{
    {"_PyErr_Format", function(macho_variadic_PyErr_Format)},
    {"_PyErr_FormatV", function(format_list)},
    {"_PyErr_WarnFormat", function(macho_variadic_PyErr_WarnFormat)},
    {"_PyUnicode_FromFormat", function(macho_variadic_PyUnicode_FromFormat)},
    {"_Py_BuildValue", function(macho_variadic_Py_BuildValue)},
    {"_PyTuple_Pack", function(macho_variadic_PyTuple_Pack)},
};

// load_libcxx(path): must be called first, since every image binds to it.
PyObject* load_libcxx(PyObject*, PyObject* path) {
  const char* text = PyUnicode_AsUTF8(path);
  if (text == nullptr) return nullptr;
  load(text);
  Py_RETURN_NONE;
}

// create(spec): what importlib's loaders do in create_module.
PyObject* create(PyObject*, PyObject* spec) {
  PyObject* origin = PyObject_GetAttrString(spec, "origin");
  PyObject* name = PyObject_GetAttrString(spec, "name");
  const char* path = origin == nullptr ? nullptr : PyUnicode_AsUTF8(origin);
  const char* full_name = name == nullptr ? nullptr : PyUnicode_AsUTF8(name);
  if (path == nullptr || full_name == nullptr) return nullptr;
  const std::string dotted = full_name;
  const std::string initialiser = "_PyInit_" + dotted.substr(dotted.rfind('.') + 1);
  const Image& image = load(path);
  auto* start = reinterpret_cast<PyObject* (*)()>(exported(image, initialiser));
  if (start == nullptr) {
    return PyErr_Format(PyExc_ImportError, "%s does not export %s", path, initialiser.c_str());
  }
  PyObject* module = start();
  if (module != nullptr && Py_IS_TYPE(module, &PyModuleDef_Type)) {
    module = PyModule_FromDefAndSpec(reinterpret_cast<PyModuleDef*>(module), spec);
  }
  Py_DECREF(origin);
  Py_DECREF(name);
  return module;
}

// execute(module): what they do in exec_module.
PyObject* execute(PyObject*, PyObject* module) {
  PyModuleDef* definition = PyModule_GetDef(module);
  if (definition != nullptr && definition->m_slots != nullptr &&
      PyModule_ExecDef(module, definition) != 0) {
    return nullptr;
  }
  Py_RETURN_NONE;
}

// configure(name, value): changes a setting of the stand-ins.
PyObject* configure(PyObject*, PyObject* arguments) {
  const char *name, *value;
  if (!PyArg_ParseTuple(arguments, "ss", &name, &value)) return nullptr;
  gpu::configure(name, value);
  Py_RETURN_NONE;
}

template <typename Texts>
PyObject* list_of(const Texts& texts) {
  PyObject* list = PyList_New(0);
  for (const std::string& text : texts) {
    PyObject* item = PyUnicode_FromString(text.c_str());
    PyList_Append(list, item);
    Py_DECREF(item);
  }
  return list;
}

// reports(): the mistakes recorded since the last call.
PyObject* reports(PyObject*, PyObject*) { return list_of(objc::take_reports()); }

// languages(): metal::languages.
PyObject* languages(PyObject*, PyObject*) { return list_of(metal::languages()); }

// misuse(what): runs a program that uses Metal wrongly. Returns its command buffer's error.
PyObject* run_misuse(PyObject*, PyObject* what) {
  const char* name = PyUnicode_AsUTF8(what);
  if (name == nullptr) return nullptr;
  return PyUnicode_FromString(metal::misuse(name).c_str());
}

// specialized(added, factor): the numbers that metal::specialized finds.
PyObject* run_specialized(PyObject*, PyObject* arguments) {
  int added;
  float factor;
  if (!PyArg_ParseTuple(arguments, "if", &added, &factor)) return nullptr;
  PyObject* list = PyList_New(0);
  for (const float number : metal::specialized(added, factor)) {
    PyObject* item = PyFloat_FromDouble(number);
    PyList_Append(list, item);
    Py_DECREF(item);
  }
  return list;
}

// alive(): the number of Objective-C objects, by class.
PyObject* alive(PyObject*, PyObject*) {
  PyObject* counts = PyDict_New();
  for (const auto& [name, count] : objc::alive()) {
    PyObject* value = PyLong_FromLong(count);
    PyDict_SetItemString(counts, name.c_str(), value);
    Py_DECREF(value);
  }
  return counts;
}

PyMethodDef methods[] = {
    {"load_libcxx", load_libcxx, METH_O, nullptr},
    {"create", create, METH_O, nullptr},
    {"execute", execute, METH_O, nullptr},
    {"configure", configure, METH_VARARGS, nullptr},
    {"reports", reports, METH_NOARGS, nullptr},
    {"misuse", run_misuse, METH_O, nullptr},
    {"specialized", run_specialized, METH_VARARGS, nullptr},
    {"languages", languages, METH_NOARGS, nullptr},
    {"alive", alive, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "macos_host", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

}  // namespace macho

PyMODINIT_FUNC PyInit_macos_host() { return PyModule_Create(&macho::definition); }
